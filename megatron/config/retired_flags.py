"""The table of retired flags and values; `megatron.config.retired` applies it.

`name=` takes one value, `name*` any number of them, a plain name none.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """Replaced by `words`; `{}` in them is the flag's value. With `yields`, any other word on the matter wins."""

    words: tuple[str, ...]
    takes: int | str = 0
    yields: bool = False


@dataclass(frozen=True)
class Ignored:
    """Has no effect; `reason` says why nothing is lost. Without a reason, not worth a note."""

    reason: str
    takes: int | str = 0


@dataclass(frozen=True)
class Refused:
    """Stops the run with `advice`, unless every value is one of `off`, which ask for nothing."""

    advice: str
    takes: int | str = 0
    off: tuple[str, ...] = ()


Fate = Alias | Ignored | Refused


def _name(entry: str) -> tuple[str, int | str]:
    """Split `name`, `name=` or `name*` into the name and the number of values it takes."""
    if entry.endswith("*"):
        return entry[:-1], "*"
    return (entry[:-1], 1) if entry.endswith("=") else (entry, 0)


def _alias(entry: str, words: str, *, yields: bool = False) -> dict[str, Fate]:
    name, takes = _name(entry)
    return {name: Alias(tuple(words.split()), takes, yields)}


def _ignored(reason: str, entries: str) -> dict[str, Fate]:
    return {name: Ignored(reason, takes) for name, takes in map(_name, entries.split())}


def _refused(advice: str, entries: str, *, off: tuple[str, ...] = ()) -> dict[str, Fate]:
    return {name: Refused(advice, takes, off) for name, takes in map(_name, entries.split())}


_ALIASES = (
    _alias("use-rotary-position-embeddings", "--position-embedding-type rope"),
    _alias("no-position-embedding", "--position-embedding-type none", yields=True),
    _alias("rotary-position-embeddings-theta=", "--rotary-base={}"),
    _alias("rope-scaling-factor=", "--rotary-scaling-factor={}"),
    _alias("rotary-seq-len-interpolation-factor=", "--rotary-scaling-type linear --rotary-scaling-factor={}"),
    _alias("num-query-groups=", "--num-key-value-heads={}"),
    _alias("encoder-num-layers=", "--num-layers={}"),
    _alias("encoder-seq-length=", "--seq-length={}"),
    _alias("layernorm-epsilon=", "--norm-epsilon={}"),
    _alias("swiglu", "--activation-function swiglu"),
    _alias("openai-gelu", "--activation-function gelu_tanh"),
    _alias("squared-relu", "--activation-function squared_relu"),
    _alias("no-bias-swiglu-fusion", "--no-bias-gelu-fusion"),
    _alias("disable-bias-linear", "--no-add-bias-linear"),
    _alias("bf16", "--precision bf16"),
    _alias("fp16", "--precision fp16"),
    _alias("fp32", "--precision fp32"),
    _alias("grad-reduce-in-bf16", "--no-accumulate-allreduce-grads-in-fp32"),
    _alias("batch-size=", "--micro-batch-size={}"),
    _alias("model-parallel-size=", "--tensor-model-parallel-size={}"),
    _alias("use-flash-attn", "--attention-backend flash_v1"),
    _alias("use-flash-attn-v1", "--attention-backend flash_v1"),
    _alias("use-flash-attn-v2", "--attention-backend flash_v2"),
    _alias("use-flash-attn-triton", "--attention-backend flash_triton"),
    _alias("enable-cuda-graph", "--cuda-graph"),
    _alias("checkpoint-activations", "--recompute-granularity full"),
    _alias("deepspeed-activation-checkpointing", "--recompute-granularity full"),
    _alias("checkpoint-num-layers=", "--recompute-num-layers={}"),
    _alias("activations-checkpoint-method=", "--recompute-granularity full --recompute-method={}"),
    _alias("checkpoint-activations-method=", "--recompute-granularity full --recompute-method={}"),
    _alias("activations-checkpoint-num-layers=", "--recompute-num-layers={}"),
    _alias("recompute-activations", "--recompute-granularity selective"),
    _alias("distribute-checkpointed-activations", "--distribute-saved-activations"),
    _alias("partition-activations", "--distribute-saved-activations"),
    _alias("checkpoint-in-cpu", "--recompute-inputs-on-host"),
    _alias("override-lr-scheduler", "--override-opt-param-scheduler"),
    _alias("use-checkpoint-lr-scheduler", "--use-checkpoint-opt-param-scheduler"),
)

_IGNORED = (
    _ignored("", "deepspeed local-rank="),
    _ignored("the launcher is recognised by what it leaves in the environment", "deepspeed-mpi"),
    _ignored("there is one implementation of the model", "use-mcore-models use-legacy-models"),
    _ignored("--num-key-value-heads alone decides about grouped queries", "group-query-attention"),
    _ignored(
        "the kernel is chosen by --attention-backend, or by the operation itself, and printed",
        "no-persist-layer-norm disable-mem-efficient-ln no-gradient-accumulation-fusion",
    ),
    _ignored(
        "attention scores are scaled once, by the root of the head size, and normalised in fp32",
        "no-query-key-layer-scaling apply-query-key-layer-scaling attention-softmax-in-fp32",
    ),
    _ignored(
        "the loss is always computed in fp32, as a mean over tokens", "fp16-lm-cross-entropy calculate-per-token-loss"
    ),
    _ignored("the training graph needs no special form for ONNX", "onnx-safe="),
    _ignored(
        "weights start as a function of the seed and their name alone", "use-cpu-initialization no-initialization"
    ),
    _ignored(
        "there are no experts without --num-experts",
        """
        topk= expert-interval* moe-train-capacity-factor= moe-eval-capacity-factor= moe-min-capacity= moe-loss-coeff=
        num-experts-switch= disable-moe-token-dropping disable-moe-top2-2nd-expert-sampling create-moe-param-group""",
    ),
    _ignored("--pipeline-model-parallel-size alone decides whether there is a pipeline", "no-pipeline-parallel"),
    _ignored(
        "DeepSpeed's pipeline decides when its stages send, and always sends whole tensors",
        "overlap-p2p-communication no-overlap-p2p-communication no-scatter-gather-tensors-in-pipeline",
    ),
    _ignored(
        "the collective of the input's gradient always runs beside the product of the weight's",
        "no-async-tensor-model-parallel-allreduce",
    ),
    _ignored(
        "DeepSpeed reduces the gradients, and ZeRO overlaps it with backward",
        """
        overlap-grad-reduce overlap-param-gather no-contiguous-buffers-in-local-ddp zero-reduce-scatter
        zero-contigious-gradients use-pin-memory""",
    ),
    _ignored("--zero-stage 1, the default, shards the optimizer's state", "use-distributed-optimizer"),
    _ignored("the optimizer's fused form is used where there is one", "ds-fused-adam cpu-torch-adam"),
    _ignored("the backend of communication follows the device", "distributed-backend="),
    _ignored("memory is given back to the device by PyTorch's allocator", "empty-unused-memory-level="),
    _ignored("kept activations lie where PyTorch's allocator puts them", "contigious-checkpointing"),
    _ignored("it had no effect in the older system", "scattered-embeddings tile-factor= no-load-lr-state"),
    _ignored("a checkpoint of any layout loads under every other", "universal-checkpoint"),
    _ignored(
        "dataset files are mapped into memory and read on demand", "mmap-warmup no-create-attention-mask-in-dataloader"
    ),
    _ignored("no code from a tokenizer's folder is ever run", "trust-remote-code"),
    _ignored(
        "non-finite losses are always counted and reported",
        """
        check-for-nan-in-loss-and-grad no-check-for-nan-in-loss-and-grad""",
    ),
    _ignored(
        "it is always reported",
        """
        log-throughput log-batch-size-to-tensorboard log-validation-ppl-to-tensorboard
        log-learning-rate-to-tensorboard log-loss-scale-to-tensorboard no-log-learnig-rate-to-tensorboard
        no-log-learning-rate-to-tensorboard no-log-loss-scale-to-tensorboard""",
    ),
    _ignored(
        "timers have one level and never wait for other ranks",
        """
        timing-log-level= timing-log-option= no-barrier-with-level-1-timing""",
    ),
    _ignored(
        "it concerned the text server of the older system",
        """
        inference-batch-times-seqlen-threshold= max-tokens-to-oom=""",
    ),
)

_NOT_YET = "this version does not have it; "
_NO_EXPERTS = "mixture of experts: " + _NOT_YET + "train a dense model (drop the flag, or --num-experts 1)"
_NO_KD = "knowledge distillation: " + _NOT_YET + "train the student on its own"
_NO_ENGINE = "products in 8 bits need no Transformer Engine: write --fp8"
_NO_HISTORY = "the scales of --fp8 are those of each matrix itself, without a history: drop the flag"
_NO_PIPELINE_SCHEDULE = "pipeline schedules: " + _NOT_YET + "drop the flag"
_NO_FPDT = "Ulysses FPDT: " + _NOT_YET + "drop the flag, and use --recompute-granularity full for long sequences"
_NO_PROFILER = "profiling: " + _NOT_YET + "run it under `nsys profile` or py-spy"
_NO_INDEX_FILES = "index files are built and cached by content: name the data with --data-path and --data-cache-path"

_REFUSED = (
    _refused(
        "DeepSpeed builds no such kernel for this program: use --attention-backend flash_v2 or flash_triton",
        "use-flash-attn-builder",
    ),
    _refused(
        "write --attention-window N, the number of tokens that each attends to, itself included",
        "window-size* window-attn-skip-freq*",
    ),
    _refused("to wait for the device after each layer, set CUDA_LAUNCH_BLOCKING=1 instead", "synchronize-each-layer"),
    _refused(_NO_EXPERTS, "num-experts* moe-expert-parallel-size= expert-model-parallel-size=", off=("1", "0")),
    _refused(_NO_EXPERTS, "mlp-type=", off=("standard",)),
    _refused(_NO_EXPERTS, "use-tutel enable-expert-tensor-parallelism moe-router-topk= moe-grouped-gemm"),
    _refused(
        _NO_FPDT, "ds-sequence-parallel-fpdt ds-sequence-parallel-fpdt-offloading ds-sequence-parallel-fpdt-chunk-size="
    ),
    _refused("--ds-sequence-parallel-size alone switches Ulysses on: drop the flag", "force-ds-sequence-parallel"),
    _refused("context parallelism: " + _NOT_YET + "drop the flag", "context-parallel-size=", off=("1",)),
    _refused(
        _NO_PIPELINE_SCHEDULE,
        """
        enable-zbh1-pipeline enable-zbh1-exact-semantics use-ring-exchange-p2p standalone-embedding-stage
        num-layers-per-virtual-pipeline-stage=""",
    ),
    _refused("FSDP is not offered: use --zero-stage 3, which shards the same", "ddp-impl=", off=("local", "torch")),
    _refused(_NO_ENGINE, "transformer-impl=", off=("local",)),
    _refused("write --cuda-graph", "cuda-graph-impl=", off=("none",)),
    _refused("write --cuda-graph", "external-cuda-graph"),
    _refused("write --fp8 --fp8-format e4m3", "fp8-e4m3"),
    _refused("write --fp8, whose format is hybrid", "fp8-hybrid"),
    _refused("--fp8 computes all three products of a layer in 8 bits: drop one of the flags", "no-fp8-wgrad"),
    _refused(_NO_HISTORY, "fp8-margin= fp8-interval= fp8-amax-history-len= fp8-amax-compute-algo="),
    _refused(_NO_HISTORY, "fp8-recipe=", off=("tensorwise",)),
    _refused("norms stand before attention and MLP here: drop the flag", "apply-residual-connection-post-layernorm"),
    _refused(
        "the embedding has the precision of the model: try --fp32-residual-connection", "embedding-weights-in-fp32"
    ),
    _refused("write `--rotary-scaling-type llama3 --rotary-scaling-factor 8`", "use-rope-scaling"),
    _refused("initial weights are normal: set --init-method-std", "init-method-xavier-uniform"),
    _refused("all data-parallel ranks start from the same weights: drop the flag", "data-parallel-random-init"),
    _refused("random layer-token drop is not offered: drop the flag", "random-ltd"),
    _refused(
        "curriculum and data-efficiency sampling are not offered: drop the flag",
        """
        data-efficiency-curriculum-learning return-data-index curriculum-learning-legacy""",
    ),
    _refused("use tools/generate_text.py to generate, --skip-train to evaluate", "inference ds-inference"),
    _refused("indices are built on first use: " + _NOT_YET + "drop the flag", "use-dataset-only"),
    _refused("samples are shuffled over all epochs: drop the flag", "dataloader-type=", off=("single",)),
    _refused(
        "a dataset is mapped into memory: convert older formats to .bin/.idx pairs", "data-impl=", off=("mmap", "infer")
    ),
    _refused("thinning the data is not offered: give weights in --data-path", "sample-rate=", off=("1",)),
    _refused("set --train-samples instead", "train-data-exact-num-epochs="),
    _refused(
        _NO_INDEX_FILES,
        """
        train-idx-path= train-desc-path= train-doc-idx-path= train-sample-idx-path= train-shuffle-idx-path=""",
    ),
    _refused("the loader goes on into the next epoch by itself: drop the flag", "repeated-dataloader"),
    _refused("give paths that this machine can open", "aml-data-download-path="),
    _refused(
        "extra sentinel tokens belong to encoder-decoder models: train a tokenizer with them",
        "vocab-extra-ids=",
        off=("0",),
    ),
    _refused(
        "splitting products into tiles is not offered: use --zero-stage 3",
        "split-transformers memory-centric-tiled-linear",
    ),
    _refused("deferred initialisation is for embedding this program in another: drop the flag", "lazy-mpu-init="),
    _refused("--finetune starts at iteration 0, with a fresh optimizer: use it instead", "reset-iteration"),
    _refused(
        "statistics of optimizer state: " + _NOT_YET + "the gradient norm is always reported",
        """
        log-optimizer-states-to-tensorboard log-num-zeros-in-grad""",
    ),
    _refused("the world size is in the run's printed configuration: drop the flag", "log-world-size-to-tensorboard"),
    _refused(
        _NO_PROFILER, "profile-backward profile* profile-steps= profile-ranks* profile-step-start= profile-step-end="
    ),
    _refused(
        "automatic resubmission: " + _NOT_YET + "--exit-duration-in-mins leaves in time",
        "adlr-autoresume adlr-autoresume-interval=",
    ),
    _refused(
        _NO_KD,
        """
        kd mos kd-alpha-ce= kd-beta-ce= kd-temp= num-layers-teacher= num-experts-teacher* hidden-size-teacher=
        num-attention-heads-teacher= load-teacher=""",
    ),
)

FATES: dict[str, Fate] = {name: fate for group in (*_ALIASES, *_IGNORED, *_REFUSED) for name, fate in group.items()}
"""Each retired flag, by its lower-case name with dashes, and its fate."""

RENAMED_VALUES: dict[str, dict[str, str]] = {
    "tokenizer_type": {
        "GPTSentencePieceTokenizer": "SentencePieceTokenizer",
        "HFTokenizer": "HuggingFaceTokenizer",
        "AutoTokenizer": "HuggingFaceTokenizer",
    },
    "normalization": {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"},
    "attention_backend": {"local": "unfused", "flash": "flash_v2", "fused": "sdpa_cudnn"},
    "optimizer": {"adamw": "adam"},
    "lr_decay_style": {"inverse_square_root": "inverse-square-root", "wsd": "WSD"},
}
"""Older values of fields, and what they are called here."""

REFUSED_VALUES: dict[str, dict[str, str]] = {
    "remote_device": {"nvme": "offloading to NVMe is not offered; use `cpu`, with --zero-stage 3."},
    "position_embedding_type": {"relative": "relative positions are not offered; use `rope`."},
    "tokenizer_type": {
        "Llama2Tokenizer": "use `HuggingFaceTokenizer` with the model's tokenizer.json, or `SentencePieceTokenizer`.",
        "BertWordPieceLowerCase": "it is BERT's; use `GPT2BPETokenizer` or `SentencePieceTokenizer` for GPT.",
        "BertWordPieceCase": "it is BERT's; use `GPT2BPETokenizer` or `SentencePieceTokenizer` for GPT.",
    },
}
"""Older values of fields that are not offered, and the advice."""
