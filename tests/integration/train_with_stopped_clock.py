"""The training program, whose watchdog's clock stands still until the file `hang` exists.

However slow the machine is, nothing takes too long before the test makes it hang.
"""

from pathlib import Path

from mtp_dist.pretrain import main
from mtp_dist.training import watchdog

monotonic = watchdog.monotonic

if __name__ == "__main__":
    watchdog.monotonic = lambda: monotonic() if Path("hang").exists() else 0.0
    watchdog.GRACE_SECONDS = 600.0
    main()
