"""The search for tuned records: which decisions of a schedule template are fastest on this machine.

    kernels of a model ──► space ──► search (MetaSchedule) ──► record files ──► compiler
                                       │  ▲
                              build, check, time in worker processes

A candidate is the symbolic function that the compiler will compile, called with inputs of representative sizes.
MetaSchedule's database in the work folder remembers every measurement, so that a search continues where it stopped.
"""
