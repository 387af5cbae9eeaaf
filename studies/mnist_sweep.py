"""Which flow settings serve a quarter-width ResNet-8 best on MNIST?

Question    Does a searched DFKT student beat scratch, KD and FSP students of the same number of epochs?
Data        MNIST: 60,000 + 10,000 grey images 28x28 in 10 classes, downloaded by torchvision; a tenth of train is val
Networks    teacher resnet14 at half width (20 epochs), student resnet8 at a quarter width (4,934 parameters)
Budget      40 trials of 15 epochs, ASHA stopping the weak ones; then 5 seeds each of scratch, KD, FSP and the best DFKT
Command     python studies/mnist_sweep.py              on a cluster: see docs/cluster.md
Smaller     --smoke (minutes on two cores); --trials, --epochs, --limit-train; --data FOLDER for images of your own
Result      docs/results.md compares it with eight other methods on a fifteenth of the images
"""

import sys

from dfkt import DataConfig, NetworkConfig, StudyConfig, TeacherConfig, TrainConfig, default_arms
from dfkt.cli.study import run_script

STUDY = StudyConfig(
    name="mnist_sweep",
    data=DataConfig(name="mnist"),
    teacher=TeacherConfig(network=NetworkConfig(name="resnet14", width=0.5), train=TrainConfig(epochs=20)),
    student=NetworkConfig(name="resnet8", width=0.25),
    train=TrainConfig(epochs=15),
    arms=default_arms(trials=40),
    seeds=5,
)

if __name__ == "__main__":
    sys.exit(run_script(STUDY, __doc__))
