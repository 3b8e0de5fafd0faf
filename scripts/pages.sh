#!/usr/bin/env bash
# Try pages in the system's Chromium: 1200 and 400 pixels wide, light and dark; axe-core looks for what shuts people out.
#   scripts/pages.sh [--out DIR] runs/digits-mssr/report.html compare/compare.html ...
# Fails where a page is wider than the screen, its script complains, or axe has a serious finding.
set -euo pipefail
cd "$(dirname "$0")/.."
axe=.venv-pages
[ -d "$axe/axe_core_python" ] || .venv/bin/pip install --quiet --no-deps --target "$axe" axe-core-python==0.1.0
exec .venv/bin/python scripts/pages.py --axe "$axe/axe_core_python/axe.min.js" "$@"
