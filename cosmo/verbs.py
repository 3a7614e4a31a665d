"""The verbs of `python -m cosmo`: their flags, their help pages, and what runs them.

Loads nothing heavy, so that `--help` and a misspelled flag answer at once. A flag whose `dest` is
in capitals is a gin macro: giving it is giving `--gin.THAT_MACRO=VALUE`, after all files.
"""

from cosmo import flags, settings
from cosmo.engine.base.command_line import Program, Verb

VERBS = {
    "quickstart": Verb(
        help="train, evaluate and question a small model on the sample corpus, offline",
        description="Train a model of 1.3 million parameters on the sample corpus, evaluate it "
        "before and after, answer questions, and print a report. The commands that it runs are "
        "printed. What an earlier quickstart left in the output folder is removed. Exit code 1 if "
        "the model did not learn.",
        examples="""\
  python -m cosmo quickstart
  python -m cosmo quickstart --output=/tmp/quickstart --train_steps=100
""",
        run="cosmo.quickstart:run_quickstart",
        add_arguments=flags.quickstart_arguments,
    ),
    "train": Verb(
        help="train, or go on from the latest checkpoint in MODEL_DIR",
        description="Train a model, or go on from the latest checkpoint in MODEL_DIR. MODEL_DIR "
        "then holds checkpoints, metrics.jsonl, TensorBoard files, config.gin and settings.json.",
        examples="""\
  python -m cosmo train --gin_file=gin/cosmo/tiny.gin --gin.MODEL_DIR=/tmp/run
  python -m cosmo train --gin_file=gin/cosmo/tiny.gin --gin.MODEL_DIR=/tmp/run \\
    --gin.TRAIN_STEPS=1200 --gin.BATCH_SIZE=32 --gin.DROPOUT_RATE=0.1
  python -m cosmo train --gin_file=gin/cosmo/tiny.gin --gin.MODEL_DIR=/tmp/run2 \\
    --gin.CACHE_PATH=/tmp/rows
""",
        run="cosmo.commands:run_train",
        gin_file="gin/runs/train.gin",
    ),
    "cache": Verb(
        help="write a mixture's packed rows to files, to train from without SeqIO",
        description="Run a mixture through SeqIO and write its packed rows to files. Training from "
        "them (--gin.CACHE_PATH) reads many times faster, in a globally shuffled order, goes on "
        "at the very row after a stop, and needs no TensorFlow (with EVAL_PERIOD=None). A command "
        "that was stopped, even killed, goes on when it is given again; a finished one checks the "
        "files, and replaces damaged ones.",
        examples="""\
  python -m cosmo cache --gin_file=gin/cosmo/tiny.gin --output=/tmp/rows --epochs=10
  python -m cosmo cache --gin_file=gin/cosmo/cosmo_3b.gin --output=/data/cosmo_rows --epochs=4 \\
    --processes=32 --gin.SODA_PATH=data/soda --gin.PROSOCIAL_PATH=data/prosocial_dialog
  python -m cosmo cache --output=/tmp/rows --show=0,17
""",
        run="cosmo.commands:run_cache",
        add_arguments=flags.cache_arguments,
        gin_file="gin/runs/cache.gin",
        takes_settings=lambda args: not args.show,
    ),
    "eval": Verb(
        help="measure a checkpoint on validation data",
        description="Measure a checkpoint on every task of its mixture: prints a table, writes "
        "metrics.json and the answers (to eval/ in the run's folder, or EVAL_OUTPUT_DIR).",
        examples="""\
  python -m cosmo eval --gin.MODEL_DIR=/tmp/run
  python -m cosmo eval --gin.MODEL_DIR=/tmp/run --gin.EVAL_SPLIT=test \\
    --gin.EVAL_NUM_EXAMPLES=100 --gin.CHECKPOINT_PATH=/tmp/run/checkpoints/60
""",
        run="cosmo.commands:run_eval",
        gin_file="gin/runs/eval.gin",
        saved_settings=True,
    ),
    "infer": Verb(
        help="answer records (--input), or a SeqIO mixture's examples, as JSON lines",
        description="Answer records, or score their responses. A command that was stopped, even "
        "killed, goes on when it is given again; a finished one says so.",
        examples="""\
  python -m cosmo infer --gin.MODEL_DIR=/tmp/run --input=records.jsonl --output=answers.jsonl
  python -m cosmo infer --gin.MODEL_DIR=/tmp/run --input=records.jsonl.gz --output=answers \\
    --num_shards=8 --shards=0-3 --batch_size=64 --temperature=1.0 --top_p=0.95 --seed=1
  python -m cosmo infer --gin.MODEL_DIR=/tmp/run --mode=score
""",
        run="cosmo.commands:run_infer",
        add_arguments=flags.infer_arguments,
        gin_file="gin/runs/infer.gin",
        saved_settings=True,
        reads_tasks=lambda args: not args.input,
    ),
    "chat": Verb(
        help="talk to a checkpoint in the terminal",
        description="Talk to a checkpoint. It asks for a situation and a role, then answers line "
        "by line; [RESET] forgets and asks anew, [END] leaves.",
        examples="""\
  python -m cosmo chat --gin.MODEL_DIR=/tmp/run
  python -m cosmo chat --gin.MODEL_DIR=/tmp/run --role="Imagine you are Maya and speak to Ivan"
""",
        run="cosmo.commands:run_chat",
        add_arguments=flags.chat_arguments,
        gin_file="gin/runs/infer.gin",
        saved_settings=True,
        reads_tasks=lambda args: False,
    ),
    "plan": Verb(
        help="what a training step needs on a TPU slice or on GPUs, without having them",
        description="Compile the step that train would run for a TPU slice, with the real TPU "
        "compiler (extra `tpu`), or for CPU devices, and say whether it fits, what it computes and "
        "sends, and how fast it can be at best; for GPUs by arithmetic. What the settings leave "
        "open is chosen as train would. Exit code 1 if it does not fit. An INITIAL_CHECKPOINT_PATH "
        "is not needed.",
        examples="""\
  python -m cosmo plan --gin_file=gin/cosmo/cosmo_3b.gin --topology=v3:4x4 --start_step=1100000
  python -m cosmo plan --gin_file=gin/cosmo/cosmo_11b.gin --topology=v3:8x8 --json --hlo=step.txt
  python -m cosmo plan --gin_file=gin/cosmo/cosmo_3b.gin --topology=v5e:4x8 --sweep
  python -m cosmo plan --gin_file=gin/cosmo/cosmo_3b.gin --topology=h100:8 --start_step=1100000
""",
        run="cosmo.planning:run_plan",
        add_arguments=flags.plan_arguments,
        gin_file="gin/runs/plan.gin",
        bindings=("MODEL_DIR = 'unused'", "INITIAL_CHECKPOINT_PATH = None"),
        environment="cosmo.planning:environment",
    ),
    "import": Verb(
        help="turn a T5X checkpoint or a HuggingFace folder into one of ours",
        description="Turn a T5X checkpoint or a HuggingFace T5 folder into one of ours, "
        "tensor by tensor. The network is read from it; no gin file is needed. Memory does not "
        "grow with the model. (Training and inference also take such paths as they are.)",
        examples="""\
  python -m cosmo import --format=t5x --output=/tmp/t5_xl_lm \\
    --source=gs://t5-data/pretrained_models/t5x/t5_1_1_lm100k_xl/checkpoint_1100000
  python -m cosmo import --format=hf --source=/data/cosmo-xl --output=/tmp/cosmo_xl
""",
        run="cosmo.convert:run_import",
        add_arguments=flags.import_arguments,
    ),
    "export": Verb(
        help="write a checkpoint as a HuggingFace folder, or as T5X restores it",
        description="Write a checkpoint as a HuggingFace folder, which AutoTokenizer and "
        "AutoModelForSeq2SeqLM load, or as a T5X checkpoint, with Adafactor's state where there "
        "is one. Memory does not grow with the model.",
        examples="""\
  python -m cosmo export --format=hf --checkpoint=/tmp/run --output=/tmp/cosmo-hf
  python -m cosmo export --format=t5x --checkpoint=/tmp/run/checkpoints/600 --output=/tmp/t5x
""",
        run="cosmo.convert:run_export",
        add_arguments=flags.export_arguments,
    ),
}

PROGRAM = Program(
    name="cosmo",
    description="Train, evaluate and question dialogue models.",
    verbs=VERBS,
    loggers=("cosmo", "tasks"),
    flags={"MODEL": "--gin_file"},
    load_settings=lambda args, bindings: settings.load(args, VERBS[args.verb], bindings),
)
