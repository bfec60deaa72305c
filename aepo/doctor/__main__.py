"""`python -m aepo.doctor`: the doctor where there is no `aepo` command, or another project's."""

from __future__ import annotations

import argparse
import sys

import aepo.doctor
from aepo.output import guard_output, status_of_output

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m aepo.doctor", description=(aepo.doctor.__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    as_json = parser.parse_args().json
    guard_output()
    sys.exit(aepo.doctor.main(as_json) or status_of_output())
