import time
from tests.tiny_run import *
def test_b(launcher, site, tmp_path):
    for i,(needle,n,size) in enumerate([("step-000008",1,100_000),("step-000008",1,2000),("LATEST",1,2600),("tmp-adapter",1,10000),("tmp-adapter",1,60000),("config.toml",1,10)]):
        o = launcher.train(tmp_path/"log", site.overrides(tmp_path/f"out{i}"), fill_disk_at,needle,n,size); print("=====",needle,size,o.status, o.err[-1800:], checkpoints_of(tmp_path/f"out{i}"))
