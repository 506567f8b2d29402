#!/bin/bash
# The paper's tables and figures in small: three mixers, three seeds, two tasks, on two CPU cores.
#   bash figures/stories260K.sh MODEL DATA OUT
# MODEL: stories260K in Hugging Face form. DATA: train.jsonl, and {recall,cloze}-{validation,test}.jsonl.
# After an interruption the same command continues. Every command below can be run alone.
set -eu
export MODEL=$1 DATA=$2 OUT=$3 OMP_NUM_THREADS=1

search() {      # BLOCKS TASK OUT [FLAGS]
    python replace.py --model "$MODEL" --blocks "$1" --task "$DATA/$2-validation.jsonl" \
        --test "$DATA/$2-test.jsonl" --all --out "$3" "${@:4}"
}

tune() {        # MODEL TASK OUT SEED
    python distill.py --finetune "$DATA/$2-validation.jsonl" --test "$DATA/$2-test.jsonl" \
        --model "$1" --out "$3" --seed "$4" --resume
}

layers() {      # RESULT COUNT: the set that an order has at that count
    python -c "import json; print(*json.load(open('$1'))['sets'][$2 - 1], sep=',')"
}

one_mixer() {   # MIXER SEED
    local blocks=$OUT/$1-$2 task order k
    python distill.py --model "$MODEL" --attn "$1" --data "$DATA/train.jsonl" --tokens 1000000 \
        --seq-len 256 --batch-size 16 --seed "$2" --out "$blocks" --resume
    for task in recall cloze; do
        search "$blocks" $task "$blocks-$task"                              # Tables 1, 2; Figure 3
        [ "$1" = jet ] || continue
        for order in local uniform "random --order-seed "{0,1,2} impact; do
            search "$blocks" $task "$blocks-$task" --order $order           # Table 4; Figures 4, 6
        done
        for order in greedy impact; do                                      # Table 4 on test
            search "$blocks" $task "$blocks-$task" --layers "$(layers "$blocks-$task/result-$order.json" 2)"
        done
        tune "$MODEL" $task "$OUT/tuned/base-$2-$task" "$2"                 # Figure 5
        for k in 1 3 5; do
            search "$blocks" $task "$OUT/hybrids/$1-$2-$task-$k" \
                --layers "$(layers "$blocks-$task/result-greedy.json" $k)"
            tune "$OUT/hybrids/$1-$2-$task-$k/opt" $task "$OUT/tuned/$1-$2-$task-$k" "$2"
        done
    done
}

export -f search tune layers one_mixer
mkdir -p "$OUT"
printf '%s\n' {jet,gdn,gla}" "{0,1,2} | xargs -P 2 -L 1 bash -c 'one_mixer $0 $1' > "$OUT/log.txt" 2>&1
python eval.py --throughput --model "$MODEL" --blocks "$OUT/jet-0" --contexts 128,496 \
    --layers-from "$OUT/jet-0-recall/result-greedy.json" --out "$OUT/throughput"        # Figure 2
python replace.py --report "$OUT"
