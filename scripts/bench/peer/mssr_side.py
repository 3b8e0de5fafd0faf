"""`mssr train`, one step a turn. Arguments: those of ``mssr train``. See `turns`."""

from __future__ import annotations

import sys

from turns import Gate

from mssr.tools import cli
from mssr.trainer.loop import Trainer


def main() -> int:
    gate = Gate()
    train_step, finish_step = Trainer._train_step, Trainer._finish_step

    def wait_and_train(self: Trainer) -> None:
        gate.wait()
        train_step(self)

    def finish_and_tell(self: Trainer) -> None:
        finish_step(self)
        gate.done({})

    Trainer._train_step, Trainer._finish_step = wait_and_train, finish_and_tell  # type: ignore[method-assign]
    return cli.main(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
