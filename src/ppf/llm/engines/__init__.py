"""Where masks are measured. Every engine runs the same function and gives the same results.

bench        what an engine promises; the model on the bench; measuring in this process
service      what a worker does: it opens a model and answers lines
pool         masks handed to workers; dead workers replaced
local        a pool of one-thread processes; worker is what they run
ray_cluster  the same on a Ray cluster
"""
