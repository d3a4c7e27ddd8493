"""Train a network: ``python train.py layer=random_routing``; ``python train.py --help`` lists the choices."""

from difflut_lab.training import main

if __name__ == "__main__":
    main()
