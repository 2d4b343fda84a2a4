#!/bin/sh
# Questions of RESULTS.md, each a command. Run it again after a stop: what is trained is not trained twice.
#
#   study/study.sh --quick                 most questions in small, on photographs that ship with scikit-image
#   study/study.sh CIFAR [PHOTOGRAPHS]     every question, on folders of small images with classes and of photographs
#
# It writes to models/ of the project, from whatever directory it is called.
# Everything is chosen on the validation split; the claims measure on test, and `prior`, by which nothing is chosen.
# Environment: PYTHON, JOBS (runs at a time; where they have equal time, one, so that none has more of the machine),
# SEEDS, BASELINE and MIX (the loss to beat and the recipe that should, as compare.py takes them; some questions add to
# them), PHOTO_BASELINE and PHOTO_MIX (the same on photographs), VQGAN (the one that has the longer time), ONLY (some of
# the questions, say ONLY="lasts rates").
set -euf # -f: brackets and stars in a path stand for themselves
unset SLURM_JOB_ID CDPATH # the id would be added to the names of runs, which later commands and a later job look for
JOBS=${JOBS:-2} BASELINE=${BASELINE:-mse=20} MIX=${MIX:-recommended}
VQGAN=${VQGAN:-$BASELINE,vqgan=0.1} PLAIN=${MIX%,fine-blocks=1} # MIX without a residual block
PHOTO_BASELINE=${PHOTO_BASELINE:-mse=5} PHOTO_MIX=${PHOTO_MIX:-recommended-photos}
QUESTIONS="baselines parts lasts claim frontier width rates quantizers instead prior"
OF_PHOTOS="photo-losses photo-claim photo-minutes"
IMAGES='' PHOTOS=''

case ${1:-} in
--quick)
    DATA="--dataset photos --image-size 32 --limit 2048 --batch-size 64 --hidden-size 32"
    JUDGES="effnet-lite0" SEEDS=${SEEDS:-2} LENGTHS="1 2" SHORT=1 LONG=2 WIDTH=64
    MINUTES="0.1 0.2" CODES="64 256" QUESTIONS="baselines lasts claim frontier width rates quantizers instead prior"
    PRIOR="--hidden-size-prior 16 --num-layers 4 --num-epochs 1" ;;
-* | "")
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2 ;;
*)
    IMAGES=$1 PHOTOS=${2:-} DATA="--hidden-size 64"
    JUDGES="effnet-lite0 classifier" SEEDS=${SEEDS:-3} LENGTHS="4 12 30 60" SHORT=4 LONG=12 WIDTH=256
    MINUTES="5 30" CODES="64 512 4096" PRIOR="--num-epochs 20"
    PHOTO_MINUTES="7 20 60 180" QUESTIONS="$QUESTIONS${PHOTOS:+ $OF_PHOTOS}" ;;
esac

fail() {
    echo "study.sh: $1" >&2
    exit 2
}

[ -z "$IMAGES" ] || IMAGES=$(cd -- "$IMAGES" 2>/dev/null && pwd) || fail "no folder $1"
[ -z "$PHOTOS" ] || PHOTOS=$(cd -- "$PHOTOS" 2>/dev/null && pwd) || fail "no folder $2"
case ${PYTHON:-} in [!/]*/*) PYTHON=$PWD/$PYTHON ;; esac
cd -- "$(dirname -- "$0")/.." # where models/ is, whatever the working directory
for question in ${ONLY:-}; do
    case " $QUESTIONS " in
    *" $question "*) ;;
    *) fail "ONLY names '$question', the questions are: $QUESTIONS" ;;
    esac
done

[ ! -x .venv/bin/python ] || PYTHON=${PYTHON:-.venv/bin/python}
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import torch' >/dev/null 2>&1 || fail "$PYTHON has no torch: say PYTHON=... or set up .venv (README, Install)"

# tables NAME FLAG...: the tables of models/study/NAME, those of the test split in models/study/NAME/test.
tables() {
    output=study/$1
    shift
    echo "== $output: compare.py $*"
    "$PYTHON" compare.py --output "$output" --jobs "$JOBS" --features $JUDGES "$@"
}

# compare NAME FLAG...: tables of trainings on IMAGES.
compare() {
    name=$1
    shift
    tables "$name" $DATA ${IMAGES:+--data-folder "$IMAGES"} "$@"
}

# How strong is a pixel loss at its best? Weight and learning rate of MSE and of L1; of the best, rates for longer.
baselines() {
    compare baselines --preset baselines --num-epochs $SHORT
    compare "baselines-$LONG" --baseline $BASELINE --losses $BASELINE,lr=1e-3 $BASELINE,lr=4e-3 --num-epochs $LONG
}

# Flags of a training of so many epochs: the longer it is, the lower the learning rate that suits the baseline.
of() { echo "--num-epochs $1 --lr $([ "$1" -le 4 ] && echo 4e-3 || echo 2e-3)"; }

# What does each part of the mix bring? The mix without it; both losses with a residual block in the decoder, and so for
# longer.
parts() {
    compare parts --baseline $BASELINE --losses $PLAIN $PLAIN,fine-blocks=1 $MIX,root-ssim=0,sharpen=0 $MIX,chroma=0 \
        $MIX,sharpen=0 $MIX,psnr=0,l1=1 $BASELINE,fine-blocks=1 --seeds $SEEDS $(of $SHORT)
    compare "parts-$LONG" --baseline $BASELINE --losses $PLAIN $PLAIN,fine-blocks=1 $BASELINE,fine-blocks=1 \
        --seeds $SEEDS $(of $LONG)
}

# Does it last? The ratio to the baseline against the length of training, and one plot of it.
lasts() {
    for epochs in $LENGTHS; do
        compare "epochs-$epochs" --baseline $BASELINE --losses $MIX --seeds $SEEDS $(of $epochs)
    done
    "$PYTHON" -m study.lengths $(printf 'study/epochs-%s ' $LENGTHS) --output models/study/lasts.png
}

# The claim: the same runs at two lengths, once, on test.
claim() {
    for epochs in $SHORT $LONG; do
        compare "epochs-$epochs" --split test --baseline $BASELINE --losses $MIX --seeds $SEEDS $(of $epochs)
    done
}

# What does more sharpness cost, and what does it bring?
frontier() {
    compare frontier --baseline $BASELINE --losses $MIX "$MIX,sharpen=0.3" "$MIX,root-ssim=0.8" $(of $SHORT)
}

# Does it hold in a wider network?
width() { compare width --baseline $BASELINE --losses $MIX --seeds $SEEDS $(of $LONG) --hidden-size $WIDTH; }

# At every rate? Curves, and bits saved at equal PSNR, SSIM and Fréchet distance.
rates() {
    rates=$(for k in $CODES; do echo "k=$k"; done)
    compare rates --baseline $BASELINE --losses $MIX --rates $rates --seeds $SEEDS $(of $SHORT)
    compare coarse --baseline $BASELINE --losses $MIX --seeds $SEEDS $(of $SHORT) --downsample 8
}

# Under every quantizer? Each versus the baseline under the same one; moving averages are what `lasts` has.
quantizers() {
    for quantizer in gradient cosine fsq rotation; do
        compare "quantizer-$quantizer" --baseline $BASELINE --losses $MIX --seeds $SEEDS $(of $SHORT) \
            --quantizer $quantizer
    done
}

# What else would one use in the same time? The published training loop as it is; a VQGAN on the best baseline, at two
# weights and two learning rates of its discriminator, and with a perceptual term; the mix, the last fifth of it under a
# discriminator. VQGAN, the one that has the longer time as well, is what the shorter one chose.
instead() (
    set -- $MINUTES
    JOBS=1
    compare "minutes-$1" --baseline $BASELINE --losses $PLAIN $PLAIN,fine-blocks=1 ancestor "$BASELINE,vqgan" \
        "$BASELINE,vqgan=0.1" "$BASELINE,vqgan=0.1,disc-lr=5e-4" l1=5,vqgan=0.1,perceptual=5 \
        "$MIX,vqgan=0.1,disc-start=0.8" --minutes "$1"
    compare "minutes-$2" --baseline $BASELINE --losses $MIX $VQGAN --minutes "$2"
)

# photographs NAME SIDE WIDTH FLAG...: the same for trainings on PHOTOS, at so many pixels a side and hidden size.
photographs() {
    name=$1 side=$2 width=$3
    shift 3
    tables "$name" --data-folder "$PHOTOS" --image-size "$side" --random-crop --hidden-size "$width" --lr 4e-3 "$@"
}

# Which loss suits photographs? The baseline at its best weight and rate, and mixes; watch the colours (saturation ratio).
photo_losses() {
    photographs photo-losses 64 64 --batch-size 32 --num-epochs 8 --baseline $PHOTO_BASELINE --losses mse=1 mse=20 \
        $PHOTO_BASELINE,lr=2e-3 $PHOTO_BASELINE,lr=8e-3 $MIX $PHOTO_MIX $PHOTO_MIX,gabor=0 $PHOTO_MIX,coarse-chroma=0 \
        $PHOTO_MIX,sharpen=1 $PHOTO_MIX,fine-blocks=1
}

# The claim on photographs of 128x128: the same runs on valid, and once on test.
photo_claim() {
    for split in valid test; do
        photographs photo-claim 128 32 --split $split --batch-size 32 --num-epochs 20 --baseline $PHOTO_BASELINE \
            --losses $PHOTO_MIX --seeds $SEEDS
    done
}

# Where does a discriminator overtake the loss? Equal time, several lengths, and a plot of them. The discriminator is as
# wide as the network.
photo_minutes() (
    JOBS=1 late=disc-lr=5e-4,disc-start=0.5
    for minutes in $PHOTO_MINUTES; do
        photographs "photo-minutes-$minutes" 128 32 --batch-size 16 --minutes "$minutes" \
            --vqgan-flags=--disc-hidden-size=32 --baseline $PHOTO_BASELINE --losses $PHOTO_MIX \
            "$PHOTO_BASELINE,vqgan=0.1,$late" "$PHOTO_BASELINE,vqgan=0.1,perceptual=1,$late" \
            "l1=5,vqgan=0.1,perceptual=5,$late"
    done
    "$PYTHON" -m study.lengths $(printf 'study/photo-minutes-%s ' $PHOTO_MINUTES) --output models/study/minutes.png
)

# Does it help the prior? The same PixelCNN on the codes of both: nats, the distance and the classes of its samples.
prior() {
    set +f
    for run in "models/study/epochs-$LONG/"*-seed0; do
        name=study/prior/$(basename "$run")
        echo "== prior: $name"
        "$PYTHON" pixelcnn_prior.py --model "$run" --output-folder "$name" --resume $PRIOR
        case $JUDGES in
        *classifier*) "$PYTHON" evaluate.py --model "$run" --prior "models/$name" --samples 500 --split test ;;
        esac
    done
    set -f
}

for question in ${ONLY:-$QUESTIONS}; do
    "$(echo "$question" | tr - _)"
done
