-- Views over a cache's Parquet files. They stand on five views and two tables that the index makes first:
-- raw_rollouts and raw_signals (the columns of the files, plus shard, row_in_shard and signal),
-- raw_pairs (a row per rollout and signal: the rollout, signal, signal_logprobs, tail_logprobs and topk_counts),
-- raw_texts and raw_branches (the same of text columns, plus shard, row_in_shard and name),
-- raw_manifests (one row per signal) and raw_lineage (every field of every manifest).
-- docs/cache.md describes each column. Log-probabilities and entropies are in nats.

CREATE OR REPLACE VIEW rollouts AS
SELECT
    rollout_id,
    prompt_id,
    sample_index,
    origin,
    domain,
    len(prompt_ids) AS prompt_tokens,
    len(loss_mask) AS response_tokens,
    len(list_filter(loss_mask, lambda counts: counts)) AS trained_tokens,
    finish_reason,
    truncated,
    answer,
    reward,
    list_avg(logprobs) AS mean_logprob_student,
    list_avg(behavior_logprobs) AS mean_logprob_behavior,
    prompt_text,
    response_text,
    prompt_ids,
    response_ids,
    shard,
    row_in_shard
FROM raw_rollouts;

-- One place is unnested and every column taken from its list there: lists that a query does not name are not read.
-- Lengths are the loss mask's, the smallest list by token.
CREATE OR REPLACE VIEW tokens AS
SELECT
    rollout_id,
    prompt_id,
    domain,
    signal,
    pos,
    response_ids[pos + 1] AS token_id,
    loss_masks[pos + 1] AS loss_mask,
    turns[pos + 1] AS turn,
    logprobs[pos + 1] AS logprob_student,
    behavior_logprobs[pos + 1] AS logprob_behavior,
    entropies[pos + 1] AS entropy_student,
    signal_logprobs[pos + 1] AS logprob_signal,
    tail_logprobs[pos + 1] AS logprob_tail,
    topk_counts[pos + 1] AS topk_count,
    response_tokens,
    reward,
    truncated,
    logprobs[pos + 1] - signal_logprobs[pos + 1] AS gap
FROM (
    SELECT
        * EXCLUDE (loss_mask),
        loss_mask AS loss_masks,
        unnest(range(len(loss_mask))) AS pos,
        len(loss_mask) AS response_tokens
    FROM raw_pairs
);

CREATE OR REPLACE VIEW topk AS
SELECT
    rollout_id,
    signal,
    unnest(flatten(list_transform(topk_counts, lambda entries, place: repeat([place - 1], entries)))) AS pos,
    unnest(flatten(list_transform(topk_counts, lambda entries: range(1, entries + 1)))) AS rank,
    unnest(topk_ids) AS token_id,
    unnest(topk_logprobs) AS logprob
FROM raw_signals;

CREATE OR REPLACE VIEW signals AS
SELECT * FROM raw_manifests;

CREATE OR REPLACE VIEW texts AS
SELECT
    rollout_id,
    name,
    text,
    value,
    finish_reason,
    prompt_ids AS shown_ids,
    response_ids AS written_ids,
    shard,
    row_in_shard
FROM raw_texts;

CREATE OR REPLACE VIEW branches AS
SELECT
    rollout_id,
    name,
    branch,
    places[branch + 1] AS pos,
    chunk_counts[branch + 1] AS chunk_tokens,
    forced_ids[branch + 1] AS forced_id,
    draw,
    scores[entry] AS score,
    response_ids[
        list_sum(list_slice(drawn_counts, 1, entry)) - drawn_counts[entry] + 1
        : list_sum(list_slice(drawn_counts, 1, entry))
    ] AS drawn_ids
FROM (
    SELECT
        *,
        (entry - 1) // (len(scores) // len(places)) AS branch,
        (entry - 1) % (len(scores) // len(places)) AS draw
    FROM (SELECT *, unnest(range(1, len(scores) + 1)) AS entry FROM raw_branches)
);

CREATE OR REPLACE VIEW lineage AS
SELECT * FROM raw_lineage;
