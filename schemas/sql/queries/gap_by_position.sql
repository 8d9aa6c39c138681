-- Mean of student minus signal log-probability (an estimate of the reverse KL) by place in the response, in doubling bins.
-- example: lightopd sql CACHE gap_by_position
SELECT
    signal,
    (2 ** bin - 1)::BIGINT AS first_pos,
    (2 ** (bin + 1) - 2)::BIGINT AS last_pos,
    count(*) AS tokens,
    round(avg(gap), 4) AS mean_gap,
    round(stddev_pop(gap), 4) AS sd_gap,
    round(max(gap)::DOUBLE, 4) AS max_gap
FROM (SELECT *, floor(log2(pos + 1)) AS bin FROM tokens WHERE loss_mask AND gap IS NOT NULL)
GROUP BY signal, bin
ORDER BY signal, bin;
