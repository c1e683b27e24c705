import sys

from autoregembed.cli import main

sys.exit(main())
