"""python -m r1fast.report RUN_DIR: writes RUN_DIR/report.html. --markdown and --picture write for a README instead."""

from __future__ import annotations

import sys
from pathlib import Path

from r1fast.config import CommandParser, UserError
from r1fast.report import markdown_table, write_picture, write_report


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser(prog="python -m r1fast.report", description=__doc__)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="what r1fast.train wrote")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--markdown", action="store_true", help="print the stage table, medians over all RUN_DIRs")
    instead.add_argument("--picture", type=Path, metavar="FILE", help="write the curves of RUN_DIR as .png or .svg")
    try:
        options = parser.parse_args(arguments)
        if options.markdown:
            print(markdown_table(options.run_dirs))
        elif options.picture:
            if len(options.run_dirs) > 1:
                raise UserError("--picture draws one run; give one RUN_DIR.")
            if not options.picture.parent.is_dir():
                raise UserError(f"--picture {options.picture}: no such directory {options.picture.parent}.")
            print(write_picture(options.run_dirs[0], options.picture))
        else:
            for run_dir in options.run_dirs:
                print(write_report(run_dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
