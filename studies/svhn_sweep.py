"""Which flow settings serve a ResNet-8 best on SVHN?

Question    Does a searched DFKT student beat scratch, KD and FSP students of the same number of epochs?
Data        SVHN: 73,257 + 26,032 images 32x32 in 10 classes, downloaded by torchvision; a tenth of train is val
Networks    teacher resnet26 (60 epochs), student resnet8
Budget      40 trials of 40 epochs, ASHA stopping the weak ones; then 5 seeds each of scratch, KD, FSP and the best DFKT
Command     python studies/svhn_sweep.py              on a cluster: see docs/cluster.md
Smaller     --smoke (minutes on two cores); --trials, --epochs, --limit-train; --data FOLDER for images of your own
Result      not run here yet: the images are not at hand
"""

import sys

from dfkt import DataConfig, NetworkConfig, StudyConfig, TeacherConfig, TrainConfig, default_arms
from dfkt.cli.study import run_script

STUDY = StudyConfig(
    name="svhn_sweep",
    data=DataConfig(name="svhn"),
    teacher=TeacherConfig(network=NetworkConfig(name="resnet26"), train=TrainConfig(epochs=60)),
    student=NetworkConfig(name="resnet8"),
    train=TrainConfig(epochs=40),
    arms=default_arms(trials=40),
    seeds=5,
)

if __name__ == "__main__":
    sys.exit(run_script(STUDY, __doc__))
