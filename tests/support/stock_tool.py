# SPDX-License-Identifier: Apache-2.0
"""A tool that starts the training in a child process, as the `trl` command does; it knows nothing of hf_nsf."""

import subprocess
import sys

if __name__ == "__main__":
    sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))
