-- Share of responses cut by the token limit, by domain and over all, with the mean reward of both kinds.
-- example: lightopd sql CACHE truncated_share
SELECT
    if(grouping(domain) = 1, 'all', coalesce(domain, 'none')) AS domain,
    count(*) AS rollouts,
    count(*) FILTER (truncated) AS truncated,
    round(avg(truncated::INTEGER), 4) AS truncated_share,
    round(avg(reward) FILTER (truncated), 4) AS mean_reward_truncated,
    round(avg(reward) FILTER (NOT truncated), 4) AS mean_reward_finished
FROM rollouts
GROUP BY ROLLUP (domain)
ORDER BY grouping(rollouts.domain) DESC, domain;
