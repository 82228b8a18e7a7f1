#!/usr/bin/env bash
# bash dist_test.sh CONFIG CHECKPOINT GPUS [options of test.py]
here=$(dirname "$0")
exec bash "$here/../dense/launch.sh" "$here/test.py" "$3" "$1" "$2" "${@:4}"
