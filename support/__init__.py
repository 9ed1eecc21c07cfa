"""What the six files of the method stand on."""

import sys
from importlib.util import find_spec

if not (find_spec("fcntl") and find_spec("resource")):  # locks of files, limits of memory
    print("These programs need Linux or macOS; on Windows run them in WSL 2.", file=sys.stderr)
    sys.exit(2)
