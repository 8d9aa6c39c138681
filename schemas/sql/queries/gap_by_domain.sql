-- Mean gap and entropy of the student by domain.
-- example: lightopd sql CACHE gap_by_domain
SELECT
    signal,
    coalesce(domain, 'none') AS domain,
    count(DISTINCT rollout_id) AS rollouts,
    count(*) AS tokens,
    round(avg(gap), 4) AS mean_gap,
    round(quantile_cont(gap::DOUBLE, 0.9), 4) AS p90_gap,
    round(avg(entropy_student), 4) AS mean_entropy
FROM tokens
WHERE loss_mask AND gap IS NOT NULL
GROUP BY ALL
ORDER BY mean_gap DESC, domain;
