#!/usr/bin/env bash
# bash dist_train.sh CONFIG GPUS [options of train.py]
here=$(dirname "$0")
exec bash "$here/../dense/launch.sh" "$here/train.py" "$2" "$1" "${@:3}"
