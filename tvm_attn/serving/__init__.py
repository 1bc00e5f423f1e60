"""A server for an artifact with the HTTP interface of OpenAI's API; needs the extra `serve`.

| file | what it has |
|---|---|
| `app.py` | `create_app`: the ASGI application with all its routes |
| `guard.py` | what every request passes first: keys, origins, shutting down, counts |
| `body.py` | reading and checking a JSON body |
| `sampling.py` | the options of a completion, as OpenAI and vLLM name them |
| `completions.py`, `chat.py` | `/v1/completions` and `/v1/chat/completions`: what is asked, what is answered |
| `answers.py` | runs the sequences of a request and sends the answer, whole or as events |
| `logprobs.py` | log-probabilities in the forms of both endpoints |
| `tokens.py` | `/tokenize`, `/detokenize`, `/tokenizer_info` |
| `metrics.py` | `/metrics` for Prometheus |
| `page/`, `page.py` | the page at `/`, and the attention that it shows |
| `ray.py` | replicas on Ray Serve |
| `server.py` | uvicorn: sockets, time limits, signals |
"""
