"""`imcap caption` as a program for Ray Jobs, with the same arguments. Paths must be absolute, or URIs.

ray job submit --working-dir . -- python jobs/caption.py s3://bucket/images s3://bucket/captions
"""

import sys

from imcap_ray.__main__ import main

if __name__ == "__main__":
    main(["caption", *sys.argv[1:]])
