#!/usr/bin/env bash
# Makes the bundled model again: about two hours on two cores. Run it from the project's folder.
#
#     bash tiny/make.sh
#
# It writes data/, one folder for each stage, and last tiny/model.safetensors. A stage that was
# interrupted is resumed when the script is run again; a stage that is finished is not repeated.
# train.py chooses bfloat16 or float32 by the processor; the bundled model was made in bfloat16.
set -euo pipefail
export OMP_NUM_THREADS=1

if [ ! -e data/stats.json ]; then
    python tiny/data.py data
fi

# Ten times as many descriptions as manual pages: take each page three times.
manual_pages() { grep '"source": "manual"' data/pairs.train.jsonl; }
{ cat data/pairs.train.jsonl; manual_pages; manual_pages; } > data/pairs.more-pages.jsonl

python -m tiny.new_model tiny/config.json data/sentencepiece.bpe.model new

# 1. Infilling short pieces, a tenth of which is masked: learn to copy (18 minutes).
torchrun --nproc-per-node 2 -m tiny.pretrain --model new --set dropout=0.0 \
    --train data/pretrain.jsonl --output copying \
    --max-source-length 40 --masked 0.1 --batch-tokens 1024 \
    --steps 1500 --warmup 0.0667 --learning-rate 2e-3

# 2. Infilling longer pieces, three tenths masked: learn to write (31 minutes).
torchrun --nproc-per-node 2 -m tiny.pretrain --model copying --set dropout=0.0 \
    --train data/pretrain.jsonl --validation data/pairs.validation.jsonl --output pretrained \
    --max-source-length 200 --masked 0.3 --batch-tokens 1024 \
    --steps 4000 --warmup 0.025 --learning-rate 1e-3 --evaluate-every 1000

# 3. Fine-tuning on the beginnings of the documents (27 minutes).
torchrun --nproc-per-node 2 train.py --model pretrained --set dropout=0.1 \
    --train data/pairs.train.jsonl --validation data/pairs.validation.jsonl --output fine-tuned \
    --max-source-length 130 --max-target-length 48 --batch-tokens 1024 \
    --steps 3000 --warmup 0.0333 --learning-rate 7e-4 --evaluate-every 500 --evaluate-on 150

# 4. Fine-tuning on whole documents, up to 4,096 tokens (23 minutes).
torchrun --nproc-per-node 2 train.py --model fine-tuned --set dropout=0.1 \
    --train data/pairs.more-pages.jsonl --validation data/pairs.validation.jsonl --output long \
    --max-target-length 64 --batch-tokens 1024 --label-smoothing 0 \
    --steps 1800 --warmup 0.0278 --learning-rate 2.5e-4 --evaluate-every 600 --evaluate-on 372

# 5. Learning from the ROUGE of its own beams (12 minutes).
torchrun --nproc-per-node 2 -m tiny.own_beams --model long --set dropout=0.1 early_stopping=false \
    --train data/pairs.more-pages.jsonl --validation data/pairs.validation.jsonl --output chosen \
    --max-target-length 48 --batch-tokens 2600 --weight 4 \
    --steps 240 --warmup 0.0833 --learning-rate 1e-4 --evaluate-every 80 --evaluate-on 372

# 6. Half precision, then rounding, which makes the file compress better.
python load_weights.py chosen --output tiny --resize-lsg --dtype float16
python -m tiny.round tiny
