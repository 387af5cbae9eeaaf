"""Which flow settings serve a ResNet-8 best on CIFAR-10?

Question    Does a searched DFKT student beat scratch, KD and FSP students of the same number of epochs?
Data        CIFAR-10: 50,000 + 10,000 images 32x32 in 10 classes, downloaded by torchvision; a tenth of train is val
Networks    teacher resnet26 (164 epochs), student resnet8
Budget      60 trials of 108 epochs, ASHA stopping the weak ones; then 5 seeds each of scratch, KD, FSP and the best DFKT
Command     python studies/cifar10_sweep.py              on a cluster: see docs/cluster.md
Smaller     --smoke (minutes on two cores); --trials, --epochs, --limit-train; --data FOLDER for images of your own
Result      docs/results.md compares it with eight other methods on a tenth of CIFAR-10's images, stored as JPEG
"""

import sys

from dfkt import DataConfig, NetworkConfig, StudyConfig, TeacherConfig, TrainConfig, default_arms
from dfkt.cli.study import run_script

STUDY = StudyConfig(
    name="cifar10_sweep",
    data=DataConfig(name="cifar10"),
    teacher=TeacherConfig(network=NetworkConfig(name="resnet26"), train=TrainConfig(epochs=164)),
    student=NetworkConfig(name="resnet8"),
    train=TrainConfig(epochs=108),
    arms=default_arms(trials=60),
    seeds=5,
)

if __name__ == "__main__":
    sys.exit(run_script(STUDY, __doc__))
