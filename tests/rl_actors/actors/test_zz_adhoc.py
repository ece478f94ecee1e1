import asyncio, threading, time, random
import pytest
from tests.rl_actors.actors.test_engine_thread import *
from tests.rl_actors.actors.test_engine_thread import FakeLlm, generate, SAMPLING, start

def test_cancel_refused(start):
    engine, llm = start()
    gate = threading.Event()
    async def go():
        blocked = asyncio.create_task(asyncio.to_thread(engine.call, lambda: gate.wait(5)))
        await asyncio.sleep(0.05)
        t = asyncio.create_task(engine.generate([1]*11, SAMPLING))
        await asyncio.sleep(0.05)
        t.cancel()
        await asyncio.sleep(0.05)
        gate.set(); await blocked
    asyncio.run(go())
    print("AFTER", generate(engine, [2, 1]), engine._failure)

def test_close_race(start):
    engine, llm = start()
    gate = threading.Event()
    async def go():
        blocked = asyncio.create_task(asyncio.to_thread(engine.call, lambda: gate.wait(5)))
        await asyncio.sleep(0.05)
        engine._commands.put(None)   # close() without the join
        t = asyncio.create_task(engine.generate([1], SAMPLING))
        await asyncio.sleep(0.05)
        gate.set(); await blocked
        try:
            print("CLOSE", await asyncio.wait_for(asyncio.gather(t, return_exceptions=True), 3))
        except TimeoutError:
            print("CLOSE: HANGS")
    asyncio.run(go())
