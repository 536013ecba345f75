"""`accelerate launch … -m clipdist.train RECIPE key=value …`"""

import sys

from clipdist.train.command import main

if __name__ == "__main__":
    sys.exit(main())
