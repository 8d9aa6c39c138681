-- Mean of student minus signal log-probability (an estimate of the reverse KL) by place in the response, in doubling bins.
-- example: lightopd sql CACHE gap_by_position
SELECT
    signal,
    (2 ** bin - 1)::BIGINT AS first_pos,
    (2 ** (bin + 1) - 2)::BIGINT AS last_pos,
    sum(tokens)::BIGINT AS tokens,
    round(sum(gap) / sum(tokens), 4) AS mean_gap,
    round(sqrt(greatest(0, sum(squares) / sum(tokens) - (sum(gap) / sum(tokens)) ** 2)), 4) AS sd_gap,
    round(max(largest)::DOUBLE, 4) AS max_gap
FROM (
    SELECT
        signal,
        floor(log2(pos + 1)) AS bin,
        count(*) AS tokens,
        sum(gap) AS gap,
        sum(gap::DOUBLE * gap) AS squares,
        max(gap) AS largest
    FROM tokens
    WHERE loss_mask AND gap IS NOT NULL
    GROUP BY signal, pos
)
GROUP BY signal, bin
ORDER BY signal, bin;
