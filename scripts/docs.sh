#!/usr/bin/env bash
# Make the site of docs/ in site/, in an environment of its own (.venv-docs), which is made first where it is not up to
# date. A link or an anchor that leads nowhere, and a page that is not in the navigation, fail.
#
#   scripts/docs.sh            then open site/index.html; no server is needed
#   scripts/docs.sh serve      on http://127.0.0.1:8000, anew with every change of a page
set -euo pipefail

TITLE=docs
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
VENV=$REPO/.venv-docs KIND=docs MADE_FROM=(scripts/docs.sh scripts/docs_requirements.txt)
STAMP=$VENV/mssr-setup.stamp LOG=$VENV/mssr-setup.log
export NO_MKDOCS_2_WARNING=1 # a message to authors of other sites

# In a process of its own, with which the lock of set-ups ends.
environment() (
    if up_to_date; then exit; fi
    wait_for_others
    if up_to_date; then exit; fi
    make_venv
    pip_install -r scripts/docs_requirements.txt
    write_stamp "$("$VENV/bin/mkdocs" --version | cut -d ' ' -f 1-3)"
)

environment
cd "$REPO"
if (($#)); then exec "$VENV/bin/mkdocs" "$@"; fi
SECONDS=0
# Not --quiet: it would keep warnings from --strict, too.
if ! "$VENV/bin/mkdocs" build --strict >"$VENV/build.log" 2>&1; then
    grep -v '^INFO' "$VENV/build.log" >&2
    die "the site was not made"
fi
rm site/404.html # of servers
if grep -rEn --include='*.html' '<(script|link|img|iframe)[^>]+(src|href)="?(https?:)?//' site; then
    die "the site would fetch these from elsewhere"
fi
say "made site/index.html in $SECONDS s"
