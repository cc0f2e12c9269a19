"""`python -m overlap` is `overlap`."""

import sys

try:
    from overlap.cli import main
except KeyboardInterrupt:
    sys.exit(130)

sys.exit(main())
