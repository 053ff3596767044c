"""One run on many processes: who they are, where the weights lie, and what is passed between them.

ranks.py      the processes, and the few words they exchange     meeting.py   how they find one another
alone.py      a model on one process, and what a layout is       fsdp.py      weights spread over ranks (FSDP2)
reshard.py    blocks gathered for each pass (ZeRO-3)             sequence.py  a document over several ranks
tensor.py     matrices split among ranks    splits.py  which ones    pieces.py  their place in checkpoints
"""
