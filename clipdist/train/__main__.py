"""`accelerate launch … -m clipdist.train RECIPE key=value …`"""

from clipdist import world
from clipdist.train.command import main

if __name__ == "__main__":
    world.end(main())
