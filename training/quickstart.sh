#!/usr/bin/env bash
# Sets up everything that is needed, trains a small panoptic model on the embedded digit scenes, evaluates and saves it,
# then loads it in a new process and draws what it sees: outputs/quickstart/predictions.png.
#
#   bash training/quickstart.sh                    arguments go to the training program
#
# VENV and PYTHON: see scripts/setup_environment.sh.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../scripts/setup_environment.sh"
setup_environment train

# One thread computes, the other core draws scenes. A model this small gains little from a second thread, and two of them wait for
# each other whenever something else runs.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

python -m training.train training/recipes/digit_scenes/panoptic/quickstart.yaml --output_dir outputs/quickstart "$@"
python -m training.predictions outputs/quickstart
echo "The model is in outputs/quickstart, its predictions are in outputs/quickstart/predictions.png."
