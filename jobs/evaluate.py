"""`imcap evaluate` as a program for Ray Jobs, with the same arguments. Paths must be absolute, or URIs.

ray job submit --working-dir . -- python jobs/evaluate.py s3://bucket/captions s3://bucket/flickr8k
"""

import sys

from imcap_ray.__main__ import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
