from tests.rl_actors.actors.test_vllm_engine import *
from tests.rl_actors.actors.test_vllm_engine import engine, model_dir, ask, Learner, PROBES
def test_temp(engine, model_dir):
    learner = Learner(model_dir)
    for T in (0.5, 2.0):
        (done,) = ask(engine, (PROBES[0], sampled(3, T)))
        for t2 in (1.0, T):
            exp = learner.logprobs([[*PROBES[0], *done.token_ids]], t2)[0][len(PROBES[0])-1:]
            print("TEMP", T, "learner at", t2, max(abs(a-b) for a,b in zip(exp, done.logprobs)))
def test_probe_in_flight(engine):
    async def go():
        t = asyncio.create_task(engine.generate(PROBES[1], SamplingParams(max_tokens=150, seed=1)))
        while not engine._waiting: await asyncio.sleep(0.001)
        try:
            p = await asyncio.wait_for(asyncio.to_thread(engine.probe_logprobs, PROBES[:1]), 30)
            print("PROBE", len(p), len(p[0]) if p else None)
        except BaseException as e: print("PROBE RAISES", repr(e)[:300])
        try: r = await asyncio.wait_for(t, 20); print("GEN", len(r.token_ids))
        except BaseException as e: print("GEN", repr(e)[:300])
    asyncio.run(go())
    print("ALIVE", engine._failure)
