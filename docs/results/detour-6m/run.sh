#!/usr/bin/env bash
# The whole study in the current directory, from texts to the page: run.sh CORPUS TASKS [SETTING ...]
# CORPUS holds novels_en.jsonl.gz, law_en.jsonl.gz and trials_en_ccby.jsonl.gz; TASKS holds a folder for each task.
# Settings such as cluster.workers_per_node=2 are those of the start run. It may be stopped: the same command continues.
set -euo pipefail
if (($# < 2)); then
    sed -n 's/^# //p' "$0"
    exit 2
fi
corpus=$(realpath "$1") tasks=$(realpath "$2") here=$(realpath "$(dirname "$0")")
cp "$here"/{start,arms,study}.yaml .
ln -sfn "$tasks" tasks
mkdir -p general
if [[ ! -e novels.jsonl ]]; then # the last five novels are held out
    zcat "$corpus/novels_en.jsonl.gz" | tail -n 5 >general/general.jsonl
    zcat "$corpus/novels_en.jsonl.gz" | head -n -5 >novels.jsonl.partial
    mv novels.jsonl.partial novels.jsonl
fi
[[ -e tokenizer/tokenizer.json ]] || python "$here/tokenizer.py" tokenizer novels.jsonl "$corpus/law_en.jsonl.gz"

prepare() { # NAME TEXT [OPTION ...]
    [[ -e shards/$1/manifest.json ]] || detour prepare "$2" --tokenizer tokenizer --output "shards/$1" "${@:3}"
}
prepare novels novels.jsonl
prepare law "$corpus/law_en.jsonl.gz"
prepare general general/general.jsonl
prepare trials "$corpus/trials_en_ccby.jsonl.gz" --held-out 0.02 --canaries 48
detour-train start.yaml --output start "${@:3}"
detour study study.yaml --output study
