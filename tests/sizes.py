"""The smallest settings of a run by the command line: seconds to compile and to train."""

TINY = (
    "--gin.BATCH_SIZE=8",
    "--gin.EMB_DIM=16",
    "--gin.NUM_HEADS=2",
    "--gin.HEAD_DIM=16",
    "--gin.MLP_DIM=64",
    "--gin.NUM_ENCODER_LAYERS=1",
    "--gin.NUM_DECODER_LAYERS=1",
    "--gin.EVAL_STEPS=1",
    "--gin.EVALUATOR_NUM_EXAMPLES=3",
    "--gin.MAX_NEW_TOKENS=8",
    "--gin.STATS_PERIOD=1",
    "--gin.SHUFFLE_BUFFER_SIZE=100",
)
