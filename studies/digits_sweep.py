"""Which flow settings serve a ResNet-8 best on scikit-learn's digits? The study that needs no download.

Question    Does a searched DFKT student beat scratch, KD and FSP students of the same number of epochs?
Data        1,797 grey 8x8 digits, embedded in scikit-learn; a fifth is test, a tenth of the rest val
Networks    teacher ResNet-14 (30 epochs), student ResNet-8
Budget      16 trials of 12 epochs, then 3 seeds of each method
Command     python studies/digits_sweep.py
"""

import sys

from dfkt import DataConfig, NetworkConfig, StudyConfig, TeacherConfig, TrainConfig, default_arms
from dfkt.cli.study import run_script

STUDY = StudyConfig(
    name="digits_sweep",
    data=DataConfig(name="digits"),
    teacher=TeacherConfig(network=NetworkConfig(name="resnet14"), train=TrainConfig(epochs=30)),
    student=NetworkConfig(name="resnet8"),
    train=TrainConfig(epochs=12, batch_size=64),
    arms=default_arms(trials=16),
    seeds=3,
)

if __name__ == "__main__":
    sys.exit(run_script(STUDY, __doc__))
