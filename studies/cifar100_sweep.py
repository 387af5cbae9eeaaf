"""Which flow settings serve a ResNet-14 best on CIFAR-100?

Question    Does a searched DFKT student beat scratch, KD and FSP students of the same number of epochs?
Data        CIFAR-100: 50,000 + 10,000 images 32x32 in 100 classes, downloaded by torchvision; a tenth of train is val
Networks    teacher resnet32 (164 epochs), student resnet14
Budget      60 trials of 108 epochs, ASHA stopping the weak ones; then 5 seeds each of scratch, KD, FSP and the best DFKT
Command     python studies/cifar100_sweep.py              on a cluster: see docs/cluster.md
Smaller     --smoke (minutes on two cores); --trials, --epochs, --limit-train; --data FOLDER for images of your own
Result      not run here yet: the images are not at hand; docs/results.md has what stands in for them
"""

import sys

from dfkt import DataConfig, NetworkConfig, StudyConfig, TeacherConfig, TrainConfig, default_arms
from dfkt.cli.study import run_script

STUDY = StudyConfig(
    name="cifar100_sweep",
    data=DataConfig(name="cifar100"),
    teacher=TeacherConfig(network=NetworkConfig(name="resnet32"), train=TrainConfig(epochs=164)),
    student=NetworkConfig(name="resnet14"),
    train=TrainConfig(epochs=108),
    arms=default_arms(trials=60),
    seeds=5,
)

if __name__ == "__main__":
    sys.exit(run_script(STUDY, __doc__))
