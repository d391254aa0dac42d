import time
from tests.tiny_run import *
def test_a(finished, half_run, site, tmp_path):
    run, o = finished
    r=copy_run(half_run, tmp_path/"h")
    t=time.time(); o=site.train(r); print(o.err, time.time()-t)
    assert metrics_of(r)==metrics_of(run)
    assert adapter_of(r)==adapter_of(run)
def test_b(launcher, site, tmp_path):
    for i,(needle,n,size) in enumerate([("step-000008",1,100_000),("step-000008",1,2000),("LATEST",1,2600),("tmp-adapter",1,10000),("tmp-adapter",1,60000),("config.toml",1,10)]):
        t=time.time()
        o = launcher.train(site.overrides(tmp_path/f"out{i}"), fill_disk_at,needle,n,size); print("=====",needle,size,o.status, o.err[-900:], checkpoints_of(tmp_path/f"out{i}"), time.time()-t)
