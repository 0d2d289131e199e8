"""One table of configuration errors: what a user writes, and the key and remedy that the message names."""

import pytest

from mtp_dist.config import load_config
from mtp_dist.config.validation import DERIVED_DEEPSPEED_KEYS
from mtp_dist.errors import ConfigError

VALUES = """
train.stps=3 => train.stps is not a known key: did you mean train.steps?
train.seed=3 => train.seed is not a known key: did you mean run.seed?
chekpoint.every=3 => chekpoint is not a known key: did you mean checkpoint?
train.warmup_stps=3 => train.warmup_stps is not a known key: did you mean optimizer.warmup_steps?
model.sequence_length=7 => model.sequence_length is not a known key: did you mean train.sequence_length?
model.rope_scaling={rope_type: linear, factr: 2, factor: 2} => model.rope_scaling.factr is not ... mean ....factor?
data.train=[{path: x, splt: y}] => data.train.0.splt is not a known key: did you mean data.train.0.split?
qqqq.every=3 => qqqq is not a known key
parallel.expert=2 & model.dropout=0 => model.dropout is not a known key ++ parallel.expert is not a known key
optimizer.learning_rate=1e-3 => optimizer.learning_rate is not a known key
train.steps='5' => train.steps = "'5'" is invalid: it should be a valid integer
train.steps=5.0 => train.steps = 5.0 is invalid: it should be a valid integer
train.steps=1e2 => train.steps = 100.0 is invalid: it should be a valid integer
train.steps=true => train.steps = True is invalid: it should be a valid integer
train.steps=5 # a few => train.steps = '5 # a few' is invalid: it should be a valid integer
run.seed=1:30 => run.seed = '1:30' is invalid: it should be a valid integer
train.steps=0 => train.steps = 0 is invalid: it should be greater than 0
train.steps= => train.steps = None is invalid: it should be a valid integer
model.trunk_layers=100000000 => model.trunk_layers ... less than or equal to
heads.count=100000000 => heads.count ... less than or equal to
train.global_batch_size=100000000000000000 => train.global_batch_size ... less than or equal to
model.hidden_size=100000000000000000000 => model.hidden_size ... less than or equal to
run.join_timeout=1e300 => run.join_timeout ... less than or equal to
parallel.sequence=1 => parallel.sequence = 1 is invalid: it should be a valid boolean
optimizer.lr=fast => optimizer.lr = 'fast' is invalid: it should be a valid number
optimizer.lr=.inf => optimizer.lr = inf is invalid: it should be a finite number
optimizer.multipliers={trnk: 1} => optimizer.multipliers.trnk ... 'trunk', 'embedding' ... 'unembedding' or 'heads'
optimizer.multipliers={trunk: 0} => optimizer.multipliers.trunk = 0 ... greater than 0, or it should be a list
optimizer.multipliers={trunk: [[1, -1]]} => optimizer.multipliers.trunk.0.1 = -1 ... greater than or equal to 0
optimizer.min_lr_ratio=1.5 => optimizer.min_lr_ratio = 1.5 ... less than or equal to 1
train.precision=fp16 => train.precision = 'fp16' is invalid: it should be 'bf16' or 'fp32'
train.freeze=[heads] => train.freeze.0 = 'heads' is invalid: it should be 'trunk'
train.freeze=trunk => train.freeze = 'trunk' is invalid
train.low_rank={rank: 0} => train.low_rank.rank = 0 is invalid: it should be greater than 0
train.low_rank={targets: [q_proj]} => train.low_rank.targets.0 = 'q_proj' is invalid ... 'linear_qkv', 'linear_proj'
train.low_rank={targets: []} => train.low_rank.targets = []
train.activation_checkpointing=some => train.activation_checkpointing = 'some' ... 'none', 'selective' or 'full'
checkpoint.directory=~nouser/x => checkpoint.directory = '~nouser/x' ... the home folder of an unknown user
parallel.partition=balancd => parallel.partition = 'balancd'
parallel.partition=4 => parallel.partition = 4
parallel.partition=[2, x] => parallel.partition.1 = 'x' ... valid integer
parallel.partition=[] => parallel.partition = []
model.rope_scaling=llama3 => model.rope_scaling = 'llama3' is invalid: it should have keys of its own
model.rope_scaling={rope_type: su, factor: 2} => model.rope_scaling.rope_type = 'su' ... 'llama3', 'yarn' or 'dynamic'
model.kv_channels=0 => model.kv_channels = 0 ... greater than 0
model.rotary_percent=0 => model.rotary_percent = 0 ... greater than 0
model.rotary_percent=1.5 => model.rotary_percent = 1.5 ... less than or equal to 1
model.sliding_window=0 => model.sliding_window = 0 ... greater than 0
model.mlp=relu => model.mlp = 'relu' is invalid: it should be 'swiglu' or 'gelu'
model.normalization=batchnorm => model.normalization = 'batchnorm' ... 'rmsnorm' or 'layernorm'
model.rope_scaling={rope_type: linear, factor: 0.5} => model.rope_scaling.factor = 0.5 ... greater than or equal to 1
heads.loss_weights=[1, x, 1, 1] => heads.loss_weights.1 = 'x' is invalid: it should be a valid number
heads.z_loss=-1e-4 => heads.z_loss = -0.0001 ... greater than or equal to 0
heads.chunk_tokens=0 => heads.chunk_tokens = 0 ... greater than 0
heads.loss_decay=0 => heads.loss_decay = 0 ... greater than 0
heads.distillation_top=0 => heads.distillation_top = 0 ... greater than 0
heads.loss_mode=fast => heads.loss_mode = 'fast' is invalid: it should be 'eager', 'recompute' or 'naive'
heads.kind=serial => heads.kind = 'serial' ... 'parallel', 'causal', 'anticausal', 'linear', 'mlp' or 'sequential'
heads.auxiliary_weight=x => heads.auxiliary_weight = 'x' ... a valid number, or it should be a list
heads.auxiliary_weight=-1 => heads.auxiliary_weight = -1 ... greater than or equal to 0, or it should be a list
heads.auxiliary_weight=true => heads.auxiliary_weight = True ... a valid number, or it should be a list
heads.auxiliary_weight={a: 1} => heads.auxiliary_weight = {'a': 1} ... a valid number, or it should be a list
heads.auxiliary_weight=[] => heads.auxiliary_weight = [] ... a valid number, or it is too short
heads.auxiliary_weight=[[1, x]] => heads.auxiliary_weight.0.1 = 'x' ... valid number
heads.auxiliary_weight=[[1.5, 0.3]] => heads.auxiliary_weight.0.0 = 1.5 ... valid integer
heads.auxiliary_weight=[[0, 0.3]] => heads.auxiliary_weight.0.0 = 0 ... greater than 0
heads.auxiliary_weight=[[1, 0.3, 4]] => heads.auxiliary_weight.0 = [1, 0.3, 4] is invalid: it is too long
heads.auxiliary_weight=[[1, 0.3], 0.1] => heads.auxiliary_weight.1 = 0.1 is invalid: it should be a list
heads.auxiliary_weight=[[1]] => heads.auxiliary_weight.0.1 is missing: give it a value
heads.prediction_distances=x => heads.prediction_distances = 'x' is invalid: it should be a list
heads.prediction_distances=3 => heads.prediction_distances = 3 is invalid: it should be a list
heads.prediction_distances=[1, x, 5, 7] => heads.prediction_distances.1 = 'x' ... valid integer
heads.prediction_distances=[1, 3.0, 5, 7] => heads.prediction_distances.1 = 3.0 ... valid integer
heads.prediction_distances=[0, 1, 2, 3] => heads.prediction_distances.0 = 0 ... greater than 0
train.steps => the override 'train.steps' is not of the form section.key=value
steps=1 => the override 'steps=1' is not of the form
=1 => the override '=1' is not of the form
.steps=1 => the override '.steps=1' is not of the form
train.=1 => the override 'train.=1' is not of the form
train..steps=1 => the override 'train..steps=1' is not of the form
train.steps.x=1 => in 'train.steps.x=1' train.steps has no keys of its own: set the whole key
data.train=[ => the value of the override 'data.train=[' is not valid YAML
"""
# The base has 4 attention heads, 2 query groups, ffn_hidden_size 384, 4 trunk layers, 4 heads, 2 stages, 300 steps,
# sequences of 256. LLAMA3, YARN and DYNAMIC are complete scalings.
INCOMPATIBLE = """
parallel.tensor=8 & model.num_query_groups=8 & model.num_attention_heads=8 & parallel.pipeline=4 => fine
parallel.tensor=2 & train.sequence_length=255 & parallel.pipeline=3 & heads.unembedding=separate => fine
parallel.tensor=2 & parallel.sequence=true & parallel.zero_stage=1 & parallel.partition=[0, 4] => fine
parallel.grad_reduce_dtype=bf16 & train.precision=bf16 & model.tie_embeddings=true & LLAMA3 => fine
checkpoint.keep_last=2 & checkpoint.keep_every=100 & heads.loss_mode=recompute & heads.chunk_tokens=64 => fine
heads.loss_mode=naive & model.rope_scaling={rope_type: linear, factor: 2} => fine
model.hidden_size=130 => model.hidden_size = 130 is not divisible by model.num_attention_heads = 4: change one
model.hidden_size=132 => model.hidden_size / model.num_attention_heads = 33 is odd
model.hidden_size=130 & model.kv_channels=16 & model.qk_norm=true & YARN => fine
model.linear_bias=true & model.qkv_bias=true & model.rotary_percent=0.25 & model.sliding_window=1 => fine
model.kv_channels=33 => model.kv_channels = 33 is odd
model.rotary_percent=0.4 & model.kv_channels=64 => model.kv_channels * model.rotary_percent = 64 * 0.4 = 25 is odd
model.rotary_percent=0.01 => model.hidden_size / ... * model.rotary_percent = 32 * 0.01 = 0 is too small
YARN & model.rope_scaling.original_max_position_embeddings=null => ....original_max_position_embeddings is missing
YARN & model.rope_scaling.beta_slow=40 => ....beta_slow = 40 must lie below ....beta_fast = 32
YARN & model.rope_scaling.mscale=0.7 => ....mscale and ....mscale_all_dim belong together: give both or neither
YARN & model.rope_scaling.low_freq_factor=2 => ....low_freq_factor = 2.0 has no effect ... or use 'llama3'
YARN & model.rope_theta=1 => model.rope_scaling.rope_type = 'yarn' needs model.rope_theta above 1
DYNAMIC & model.rotary_percent=0.0625 => model.rope_scaling.rope_type = 'dynamic' needs more than 2 rotated channels
DYNAMIC & model.rope_scaling.truncate=true => ....truncate = True has no effect ... remove it or use 'yarn'
model.rope_scaling={rope_type: linear, factor: 2, high_freq_factor: 4.0} => ....high_freq_factor = 4.0 ... remove it
LLAMA3 & model.rope_scaling.original_max_position_embeddings=null => ....original_max_position_embeddings is missing
LLAMA3 & model.rope_scaling.low_freq_factor=4 => ....low_freq_factor = 4.0 must lie below ....high_freq_factor = 4.0
checkpoint.keep_every=100 => checkpoint.keep_every = 100 needs checkpoint.keep_last
model.num_query_groups=3 => model.num_attention_heads = 4 is not divisible by model.num_query_groups = 3
parallel.tensor=3 => model.num_attention_heads = 4 ... tensor = 3 ++ model.num_query_groups = 2 ... tensor = 3
parallel.tensor=4 => model.num_query_groups = 2 is not divisible by parallel.tensor = 4: change one of the two
parallel.tensor=2 & model.ffn_hidden_size=385 => model.ffn_hidden_size = 385 is not divisible by parallel.tensor = 2
parallel.pipeline=7 => parallel.pipeline = 7 stages ... model.trunk_layers = 4: ... use at most 6
parallel.pipeline=3 & parallel.partition=uniform => model.trunk_layers = 4 is not divisible by parallel.pipeline = 3
parallel.partition=[2, 1] => parallel.partition = [2, 1] must list parallel.pipeline = 2 numbers with the sum ... 4
parallel.partition=[2, 1, 1] => parallel.partition = [2, 1, 1] must list parallel.pipeline = 2 numbers
parallel.pipeline=3 & parallel.partition=[4, 0, 0] => parallel.partition = [4, 0, 0] leaves a stage without a layer
parallel.schedule=dualpipev & parallel.partition=[0, 1, 3, 0] => fine
parallel.schedule=dualpipev & parallel.pipeline=3 & heads.weighted_hidden_states=true => fine
parallel.schedule=dualpipev & parallel.pipeline=1 => parallel.schedule = 'dualpipev' needs parallel.pipeline above 1
parallel.schedule=dualpipev & parallel.pipeline=4 => 2 * parallel.pipeline = 8 stages ... layers = 4: ... use at most 6
parallel.schedule=dualpipev & parallel.pipeline=3 & parallel.partition=uniform => \
model.trunk_layers = 4 is not divisible by 2 * parallel.pipeline = 6
parallel.schedule=dualpipev & parallel.partition=[2, 2] => parallel.partition = [2, 2] must list 2 * ... = 4 numbers
parallel.schedule=dualpipev & parallel.partition=[2, 0, 1, 1] => \
parallel.partition = [2, 0, 1, 1] leaves a stage without a layer
heads.stages=2 & heads.kind=mlp & heads.detach=full & heads.schedule=forward & parallel.partition=[4, 0] => fine
heads.stages=3 & parallel.pipeline=8 & parallel.partition=[0, 1, 1, 1, 1, 0, 0, 0] => fine
heads.stages=2 & parallel.pipeline=1 => heads.stages = 2 exceeds parallel.pipeline = 1
heads.stages=3 & heads.count=2 & parallel.pipeline=3 => heads.stages = 3 exceeds heads.count = 2
heads.stages=2 & heads.kind=causal => heads.stages = 2 is incompatible with heads.kind = 'causal', ... read each other
heads.stages=2 & heads.distillation=0.5 => heads.stages = 2 is incompatible with heads.distillation
heads.stages=2 & heads.total_variation=0.5 => heads.stages = 2 is incompatible with heads.total_variation
heads.stages=2 & heads.token_order=0.5 => heads.stages = 2 is incompatible with heads.token_order
heads.stages=2 & heads.condition=previous_token => heads.stages = 2 is incompatible with heads.condition
heads.stages=2 & heads.weighted_hidden_states=true => heads.stages = 2 is incompatible ... weighted_hidden_states
heads.stages=2 & heads.loss_mode=naive => heads.stages = 2 is incompatible with heads.loss_mode = 'naive'
heads.stages=2 & parallel.schedule=dualpipev => heads.stages = 2 is incompatible with parallel.schedule = 'dualpipev'
heads.stages=2 & parallel.partition=measured => parallel.partition = 'measured' ... heads.stages = 2 ... use 'balanced'
heads.stages=2 & train.freeze=[trunk] => train.freeze = [trunk] is incompatible with heads.stages = 2
heads.stages=2 & train.low_rank={} => train.low_rank is incompatible with heads.stages = 2
heads.stages=2 & parallel.partition=[2, 2] => parallel.partition = [2, 2] gives layers to stages behind the first one
heads.stages=2 & parallel.pipeline=4 & parallel.partition=[4, 0, 0, 0] => \
parallel.partition = [4, 0, 0, 0] leaves a stage without a layer
heads.stages=2 & parallel.pipeline=8 => parallel.pipeline - heads.stages + 1 = 7 stages are too many ... at most 6
heads.stages=2 & parallel.pipeline=4 & parallel.partition=uniform => \
model.trunk_layers = 4 is not divisible by parallel.pipeline - heads.stages + 1 = 3
parallel.schedule=dualpipev & train.freeze=[trunk] => parallel.schedule = 'dualpipev' ... train.freeze ... use '1f1b'
parallel.tensor=2 & parallel.sequence=true & train.sequence_length=255 => train.sequence_length = 255 ... tensor = 2
parallel.sequence=true => parallel.sequence = true needs parallel.tensor above 1
parallel.zero_stage=2 => parallel.zero_stage = 2 is not 0 or 1
parallel.grad_reduce_dtype=bf16 => parallel.grad_reduce_dtype = 'bf16' needs train.precision = 'bf16', not 'fp32'
optimizer.betas=[0.9, 1.0] => optimizer.betas = [0.9, 1.0] must lie below 1
optimizer.multipliers={trunk: 0.1, embedding: 0.2, head_1: 0.3, unembedding: 0.4, heads: 2} => fine
heads.count=1 & optimizer.multipliers={heads: 2} => optimizer.multipliers.heads ... heads.count is 1: remove it
heads.kind=mlp & optimizer.multipliers={head_1: 2} => optimizer.multipliers.head_1 ... heads.kind = 'mlp'
model.tie_embeddings=true & optimizer.multipliers={unembedding: 2} => optimizer.multipliers.unembedding ... tie
optimizer.multipliers={trunk: [[1, 0], [300, 0.1]], head_1: [[1, 2]]} & train.steps=300 => fine
optimizer.multipliers.trunk=[[1, 0], [9, 1]] & optimizer.multipliers.heads=[[1, 1], [9, 0]] => fine
optimizer.multipliers={trunk: [[2, 0]]} => optimizer.multipliers.trunk ... [2]: they must begin with 1 and increase
optimizer.multipliers={trunk: [[1, 0], [301, 1]]} => optimizer.multipliers.trunk is 0 in each ... = 300 ... train.freeze
optimizer.multipliers={heads: [[1, 0]]} => optimizer.multipliers.heads is 0 in each of train.steps = 300: give it
heads.count=1 & optimizer.multipliers={trunk: [[1, 0], [9, 1]]} => optimizer.multipliers are all 0 from step 1 on
heads.count=1 & optimizer.multipliers={trunk: [[1, 1], [301, 0]]} => fine
heads.kind=mlp & optimizer.multipliers={head_1: [[1, 1]]} => optimizer.multipliers.head_1 ... heads.kind = 'mlp'
log.profile_steps=[7, 5] => log.profile_steps = [7, 5] must be [first, last] with first <= last
log.profile_steps=[5, 301] => log.profile_steps = [5, 301] goes beyond train.steps = 300: choose steps within the run
train.spike_rollback=true & train.spike_deviations=null => train.spike_rollback = true needs train.spike_deviations
heads.unembedding=separate & model.tie_embeddings=true => model.tie_embeddings = true ... heads.unembedding = 'shared'
heads.loss_mode=naive & heads.chunk_tokens=64 => heads.chunk_tokens ... heads.loss_mode = 'naive': remove it
heads.loss_mode=naive & heads.distillation=0.5 => heads.distillation ... heads.loss_mode = 'naive' ... use 'eager'
heads.loss_mode=naive & heads.token_order=0.5 => heads.token_order ... heads.loss_mode = 'naive' ... use 'eager'
heads.loss_mode=naive & heads.schedule=reverse => heads.schedule ... heads.loss_mode = 'naive' ... use 'eager'
heads.repeated=true => heads.repeated = true ... heads.kind is 'parallel': remove it
heads.kind=linear & heads.layers_per_head=2 => heads.layers_per_head = 2 ... heads.kind = 'linear' ... remove it
heads.layers_per_head=0 => heads.layers_per_head = 0 ... heads.unembedding = 'separate' ... 'parallel' and 'shared'
heads.kind=causal & heads.unembedding=separate & heads.layers_per_head=0 => heads.layers_per_head = 0 ... 'causal'
heads.kind=mlp & heads.layers_per_head=3 => heads.layers_per_head = 3 ... heads.kind = 'mlp' ... remove it
heads.kind=mlp & heads.weighted_hidden_states=true & heads.detach=true => fine
heads.count=1 & heads.weighted_hidden_states=true => heads.weighted_hidden_states ... heads.count is 1: remove it
heads.kind=causal & heads.weighted_hidden_states=true => heads.weighted_hidden_states ... heads.kind = 'causal'
heads.kind=anticausal & heads.detach=true => heads.detach = true is incompatible with heads.kind = 'anticausal'
heads.kind=anticausal & heads.detach=full => heads.detach = full is incompatible with heads.kind = 'anticausal'
heads.kind=causal & heads.condition=previous_token => heads.condition = 'previous_token' ... 'causal': remove it
heads.kind=sequential & heads.condition=previous_token => heads.condition ... trunk only ... 'sequential': remove it
heads.count=1 & heads.condition=previous_token => heads.condition = 'previous_token' ... heads.count is 1: remove it
heads.condition_rank=8 => heads.condition_rank = 8 has no effect without heads.condition: set it ... or remove the key
heads.condition=previous_token & heads.condition_rank=512 => heads.condition_rank = 512 ... hidden_size = 128: lower it
heads.detach=ful => heads.detach = 'ful' is invalid: it should be a valid boolean, or it should be 'full'
heads.kind=anticausal & heads.schedule=forward => heads.schedule = 'forward' ... heads.kind = 'anticausal'
heads.kind=anticausal & heads.distillation=0.5 => heads.distillation ... heads.kind = 'anticausal'
heads.count=1 & heads.distillation=0.5 => heads.distillation ... heads.count is 1: remove it
heads.count=1 & heads.auxiliary_weight=0.3 => heads.auxiliary_weight ... heads.count is 1: remove it
heads.distillation_top=5 => heads.distillation_top has no effect without heads.distillation or heads.total_variation
heads.distillation_top=5 & heads.total_variation=0.5 => fine
heads.loss_mode=naive & heads.total_variation=0.5 => heads.total_variation ... heads.loss_mode = 'naive' ... use 'eager'
heads.count=1 & heads.total_variation=0.5 => heads.total_variation ... heads.count is 1: remove it
heads.kind=anticausal & heads.total_variation=0.5 => heads.total_variation ... heads.kind = 'anticausal'
heads.token_order_window=5 => heads.token_order_window has no effect without heads.token_order
heads.prediction_distances=[1, 3] => heads.prediction_distances = [1, 3] has 2 numbers, heads.count is 4: give one
heads.prediction_distances=[2, 3, 4, 5] => heads.prediction_distances = [2, 3, 4, 5] must increase from 1
heads.prediction_distances=[1, 3, 3, 5] => heads.prediction_distances = [1, 3, 3, 5] must increase from 1
heads.prediction_distances=[1, 2, 3, 257] => the last of heads.prediction_distances, 257, ... sequence_length = 256
heads.kind=sequential & heads.prediction_distances=[1, 3, 5, 7] => heads.prediction_distances ... 'sequential'
heads.loss_weights=[1, 1, 1, 1] & heads.auxiliary_weight=0.3 => heads.loss_weights and heads.auxiliary_weight ... one
heads.auxiliary_weight=0 & heads.loss_decay=0.3 => heads.auxiliary_weight and heads.loss_decay ... keep one
heads.loss_weights=[1, 2] => heads.loss_weights has 2 numbers, heads.count is 4: give one per head
heads.loss_weights=[0, 0, 0, 0] => heads.loss_weights are all 0: ... give at least one head a weight above 0
heads.loss_weights=[0, 1, 1, 1] & heads.detach=true => heads.detach = true ... heads.loss_weights is 0 ... above 0
heads.loss_weights=[0, 1, 1, 1] & heads.distillation=0.5 => heads.distillation has head 1 as its teacher ... above 0
heads.loss_weights=[1, 0, 0, 0] & heads.distillation=0.5 => heads.distillation ... weights are all 0
heads.auxiliary_weight=0 & heads.distillation=0.5 => heads.distillation ... weights are all 0
heads.loss_weights=[0, 1, 1, 1] & heads.schedule=forward => heads.schedule = 'forward' ... is 0: give it a weight
heads.auxiliary_weight=[[2, 0.3]] => heads.auxiliary_weight has the steps [2]: they must begin with 1 and increase
heads.auxiliary_weight=[[1, 0.3], [9, 0.1], [9, 0.2]] => heads.auxiliary_weight has the steps [1, 9, 9]
heads.auxiliary_weight=[[1, 0.3], [9, 0.1], [5, 0.2]] => heads.auxiliary_weight has the steps [1, 9, 5]
heads.count=21 & heads.schedule=reverse & train.steps=20 => heads.schedule = 'reverse' ... 21 stages ... fewer heads
data.train=[{path: a, stream: true}, {path: b}] => data.train has sources with and without `stream`
data.stream_shards=4 => data.stream_shards = 4 splits streams: remove it
data.validation=[{path: a}, {path: b}] => data.validation has 2 sets with the names [None, None]
data.train=[{path: a, name: x}, {path: b, name: x}] => data.train has sources with the names ['x', 'x']
data.train=[{path: a, name: '1'}, {path: b, name: x}] => data.train has sources with the names
data.validation=[{path: a, name: x}, {path: b}] => data.validation has 2 sets with the names ... give each a different
data.validation=[{path: a, name: x}, {path: b, name: x}] => data.validation has 2 sets with the names ['x', 'x']
train.freeze=[trunk] & heads.kind=anticausal => train.freeze = [trunk] ... heads.kind = 'anticausal' ... another kind
train.freeze=[trunk] & heads.count=1 => train.freeze = [trunk] ... heads.count is 1 ... raise heads.count
train.freeze=[trunk] & heads.loss_weights=[1, 0, 0, 0] => train.freeze = [trunk] ... are all 0 ... above 0
train.freeze=[trunk] & heads.auxiliary_weight=0 => train.freeze = [trunk] ... are all 0 ... above 0
train.freeze=[trunk] & heads.detach=full => heads.detach = full has no effect with train.freeze = [trunk] ... remove it
train.freeze=[trunk] & optimizer.multipliers={trunk: 0.1} => optimizer.multipliers.trunk ... train.freeze ... remove
train.freeze=[trunk] & heads.schedule=reverse => heads.schedule = 'reverse' ... train.freeze ... use 'constant'
train.freeze=[trunk] & heads.weighted_hidden_states=true & parallel.pipeline=1 => fine
train.freeze=[trunk] & heads.weighted_hidden_states=true => \
heads.weighted_hidden_states = true ... train.freeze = [trunk] needs parallel.pipeline = 1, it is 2
train.freeze=[trunk] & train.spike_rollback=true => train.spike_rollback = true ... train.freeze ... remove it
train.low_rank={} & train.freeze=[trunk] => train.freeze = [trunk] ... train.low_rank adapts it: remove one of them
train.low_rank={rank: 65} & model.hidden_size=64 => train.low_rank.rank = 65 exceeds model.hidden_size = 64 ... lower it
train.low_rank={} & heads.kind=anticausal => train.low_rank ... heads.kind = 'anticausal' ... use another kind
train.low_rank={} & parallel.partition=[0, 4] => train.low_rank freezes the embedding ... needs a trunk layer to train
train.low_rank={} & optimizer.multipliers={embedding: 2} => optimizer.multipliers.embedding ... train.low_rank freezes
train.low_rank={} & heads.kind=linear & optimizer.multipliers={head_1: 2} => optimizer.multipliers.head_1 ... remove it
train.low_rank={} & optimizer.multipliers={trunk: 3, head_1: 2, heads: 1} & heads.schedule=forward => fine
heads.kind=anticausal & heads.detach=true & heads.loss_mode=naive & heads.distillation=1 => \
heads.detach ++ heads.distillation ++ heads.distillation
train.stps=3 & optimizer.lr=-1 => optimizer.lr = -1 is invalid ++ train.stps is not a known key
""".replace("\\\n", "")
SCALINGS = {
    "LLAMA3": "{rope_type: llama3, factor: 8, low_freq_factor: 1, high_freq_factor: 4, "
    "original_max_position_embeddings: 64}",
    "YARN": "{rope_type: yarn, factor: 4, original_max_position_embeddings: 64}",
    "DYNAMIC": "{rope_type: dynamic, factor: 4, original_max_position_embeddings: 64}",
}


def message_of(path, overrides=()):
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value)


@pytest.mark.parametrize("case", [*filter(None, (VALUES + INCOMPATIBLE).split("\n"))])
def test_error_names_key_and_remedy(base, case):
    settings, expected = case.split(" => ")
    for name, scaling in SCALINGS.items():
        settings = settings.replace(name, f"model.rope_scaling={scaling}")
    overrides = settings.split(" & ")
    if expected == "fine":
        load_config(base, overrides)
        return
    lines, messages = sorted(message_of(base, overrides).splitlines()), expected.split(" ++ ")
    assert len(lines) == len(messages), lines
    for line, message in zip(lines, messages, strict=True):
        start, *fragments = message.replace("....", "model.rope_scaling.").split(" ... ")
        assert line.startswith(start) and all(fragment in line for fragment in fragments), line


@pytest.mark.parametrize("key", sorted(DERIVED_DEEPSPEED_KEYS))
def test_deepspeed_section_cannot_replace_what_is_derived(base, key):
    assert message_of(base, [f"deepspeed.{key}=1"]) == f"deepspeed.{key} is derived from the other sections: remove it"
