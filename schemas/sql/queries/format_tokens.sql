-- Tokens that carry most of the gap in all: often line ends, digits or the end token, which a teacher writes otherwise.
-- k = 25: how many
-- signal = null: one signal, all when null
-- example: lightopd sql CACHE format_tokens k=10
SELECT
    signal,
    token_id,
    token(token_id) AS token,
    count(*) AS tokens,
    round(avg(gap), 4) AS mean_gap,
    round(sum(gap), 2) AS total_gap,
    round(sum(gap) / nullif(sum(sum(gap)) OVER (PARTITION BY signal), 0), 4) AS share_of_gap
FROM tokens
WHERE loss_mask AND gap IS NOT NULL AND ($signal IS NULL OR signal = $signal)
GROUP BY signal, token_id
ORDER BY abs(sum(gap)) DESC, signal, token_id
LIMIT $k;
