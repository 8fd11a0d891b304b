"""One example, followed from titles to a ranked list; every number can be worked out by hand, and the tests run it.

Five films, and their semantic IDs: L = 3 levels, K = 3 codes. The two about the sea share a first code.

>>> import torch
>>> from gflowgr import Policy, trajectory_balance, detailed_balance
>>> from reward import CollaborativeModel, Reward
>>> from tokenizer import SemanticIDs
>>> titles = ["Silent Reef", "Golden Tide", "Last Orbit", "Hidden Comet", "Little Oasis"]
>>> ids = SemanticIDs([[0, 1, 0], [0, 1, 2], [1, 0, 0], [1, 2, 0], [2, 0, 0]], num_codes=3)

**History → tokens.** A user liked Silent Reef, then Last Orbit. Codes are tokens 0–8 (code c of level l is l·K + c),
<user> is 9, and the items are 10–14. What the user likes next, v, is Golden Tide.

>>> history, v = [titles.index("Silent Reef"), titles.index("Last Orbit")], titles.index("Golden Tide")
>>> policy = Policy(ids, window=4, width=32, layers=1).eval()
>>> policy.tokens([history])[0].tolist()
[[9, 10, 12]]

**Legal codes.** Every first code has an item; after 0 comes 1 alone; after 0, 1 come 0 or 2.

>>> [ids.legal(prefix).int().tolist() for prefix in ([], [0], [0, 1])]
[[1, 1, 1], [0, 1, 0], [1, 0, 1]]

**Path.** A policy whose token embeddings are zero finds every legal code equally likely: 1/3 · 1 · 1/2 for Golden Tide.

>>> _ = policy.lm.transformer.wte.weight.data.zero_()
>>> steps = policy.path_log_probs([history], [[v]])            # log P_F of each step, (1 user, 1 item, 3 steps)
>>> [round(p, 3) for p in steps[0, 0].exp().tolist()]
[0.333, 1.0, 0.5]

**Reward.** The CM has seen two other users, and what followed Silent Reef and Last Orbit there. Similarity counts the
codes shared with v: 3 with itself, 2 with Silent Reef, 0, 0 and 0 with the others, as shares of 5.

>>> cm = CollaborativeModel.fit([[0, 1], [2, 3, 1]], num_items=5, popularity=0.0)
>>> reward = Reward(ids, cm, weights=(0.3, 0.6, 0.1), epsilon=1e-3)   # round numbers, for the hand
>>> liked = torch.tensor([True])
>>> def row(values): return [round(x, 3) for x in values[0].tolist()]
>>> row(reward.action(torch.tensor([v]), liked)), row(reward.similarity(torch.tensor([v])))
([0.0, 1.0, 0.0, 0.0, 0.0], [0.4, 0.6, 0.0, 0.0, 0.0])

Silent Reef is one item older (decay .6), and Golden Tide stood next to it once, and two places after Last Orbit
(nearness .8): (.6 · 1 + .8) / (.6 · 1 + .8 + 1) = .583.

>>> row(reward.collaborative([history]))
[0.0, 0.583, 0.0, 0.417, 0.0]
>>> R = reward([history], torch.tensor([v]), liked)            # .3 · r_a + .6 · r_ŷ + .1 · r_s + .001/5
>>> row(R)
[0.04, 0.71, 0.0, 0.25, 0.0]

**Flows.** Summed over the tree from below: all of the flow through the first codes 0, 1 and 2, and Z in the root.

>>> F = ids.flows(R)[0]
>>> [round(F[ids.node(prefix)].item(), 3) for prefix in ([], [0], [1], [2])]
[1.001, 0.75, 0.25, 0.0]

**Loss.** With log Z = 0, trajectory balance on Golden Tide is (0 + log 1/6 − log .710)² = 2.1. With the exact flows for
a policy, log P_F = log F(child) − log F(parent), the loss is nothing.

>>> round(trajectory_balance(torch.zeros(1), steps.sum(-1), R[:, [v]].log()).item(), 2)
2.1
>>> log_F = F[ids.nodes[v]].log()[None, None]                  # log F of s_0 … s_3 on the way to v
>>> log_pf = log_F[..., 1:] - log_F[..., :-1]
>>> round(trajectory_balance(log_F[:, 0, 0], log_pf.sum(-1), R[:, [v]].log()).item(), 6)
0.0
>>> round(detailed_balance(log_F, log_pf).item(), 6)
0.0

L = L_GR + λ · TB; L_GR = −log 1/6 = 1.79, and with λ = .1 it is 1.79 + .1 · 2.1 = 2.0.

>>> round(-steps.sum().item() + 0.1 * 2.1, 1)
2.0

**Ranked list.** What the user had is left out. The untrained policy prefers Little Oasis, alone under its first code
(1/3); guided by the CM (its power γ = 2) the list begins with Golden Tide.

>>> titles[policy.recommend([history], k=1)[0].item()]
'Little Oasis'
>>> [titles[i] for i in policy.recommend([history], k=2, guide=cm.scores([history]) ** 2)[0][0].tolist()]
['Golden Tide', 'Hidden Comet']
"""
