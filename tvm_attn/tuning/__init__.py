"""The search for tuned records: which decisions of a schedule template are fastest on a device.

    kernels of a model ──► candidates ──► compile ──► check, time ──► whole calls ──► records ──► build
       (tuner)        (space, strategy) (builder)    (runner)        (whole)      (records)
                                                 └── measurements.jsonl: a search goes on from there

A candidate is the function that a build would compile, called with inputs of representative sizes (`calls`). Compiling
and measuring run in processes of their own (`process`), so that what crashes or hangs stops nothing else. `runner`
needs only TVM's runtime; it also measures behind TVM's RPC, and on machines to which nothing but files go (`batch`).
"""
