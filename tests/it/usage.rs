//! The resource usage of agents in `ps` and `status`: samples of their whole trees.

use fermata_protocol::load::{Load, MemoryKind};
use fermata_tests::waiting::{SOON, wait_for, wait_until};
use fermata_tests::{Sandbox, process};
use serde_json::json;

use crate::bed::{MECHANISMS, SIGNALS, agent, call, run_agent, wait_for_file, web};

/// Waits until a sample meets a condition.
#[track_caller]
fn wait_for_load(sandbox: &Sandbox, name: &str, what: &str, wanted: impl Fn(&Load) -> bool) -> Load {
    wait_for(SOON, &format!("web/{name} to show {what}"), || agent(sandbox, name).load.filter(|load| wanted(load)))
}

#[test]
fn a_sample_counts_the_whole_tree_even_what_has_left_its_session() {
    for config in MECHANISMS {
        let sandbox = Sandbox::builder().config(config).start();
        run_agent(&sandbox, "a", "sleep 1000 & setsid sh -c 'sleep 1000 & wait' & echo ok > up; wait");
        wait_for_file(&sandbox, "up");
        // The shell, two sleeps and the shell in between.
        let load = wait_for_load(&sandbox, "a", "four processes", |load| load.processes == 4);
        assert!(load.memory_bytes > 100_000 && load.memory_peak_bytes >= load.memory_bytes, "{load:?}");
        let status = sandbox.ctl_json(&["status", "web"]);
        assert_eq!(status["agents"][0]["load"]["processes"], 4, "{status}");
        let table = sandbox.ctl(&["ps"]);
        for word in ["CPU", "MEM", "PROCS", "iB"] {
            assert!(table.contains(word), "{word} is missing in:\n{table}");
        }
        sandbox.ctl(&["kill", "web/a"]);
        assert_eq!(agent(&sandbox, "a").load, None, "it uses nothing any more");
    }
}

#[test]
fn processor_time_is_counted_while_it_is_used_and_afterwards() {
    for config in MECHANISMS {
        let sandbox = Sandbox::builder().config(config).start();
        run_agent(&sandbox, "busy", "while :; do :; done");
        run_agent(&sandbox, "idle", "echo ok > up; exec sleep 1000");
        wait_for_file(&sandbox, "up");
        let busy = wait_for_load(&sandbox, "busy", "a second of work", |load| load.cpu_us > 1_000_000);
        // Other tests run at the same time: the share of the processor is unknown, but not zero.
        assert!(busy.cpu_percent.is_some_and(|percent| percent > 1.0), "{busy:?}");
        let idle = wait_for_load(&sandbox, "idle", "a sample", |_| true);
        assert!(idle.cpu_us < 500_000, "{idle:?}");
        // The usage of ended children counts, whichever process has waited for them.
        let work = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done";
        run_agent(&sandbox, "gone", &format!("sh -c '{work}'; (setsid sh -c '{work}' &); echo ok > gone; sleep 1000"));
        wait_for_file(&sandbox, "gone");
        wait_until(SOON, "the child to be gone", || {
            process::tree(agent(&sandbox, "gone").pid.expect("it runs")).len() <= 2
        });
        wait_for_load(&sandbox, "gone", "its children's work", |load| load.cpu_us > 50_000);
    }
}

#[test]
fn bytes_that_went_to_the_disk_are_counted() {
    let sandbox = Sandbox::builder().config(SIGNALS).start();
    run_agent(
        &sandbox,
        "a",
        "dd if=/dev/zero of=big bs=1048576 count=8 conv=fsync 2> /dev/null; echo ok > up; exec sleep 1000",
    );
    wait_for_file(&sandbox, "up");
    let load = wait_for_load(&sandbox, "a", "a sample", |load| load.processes == 1);
    if web(&sandbox).path().starts_with("/dev/shm") || load.io_written_bytes.is_none() {
        eprintln!("not tested: bytes written cannot be read here");
        return;
    }
    // A temporary directory in memory causes no disk writes.
    let in_memory = nix::sys::statfs::statfs(web(&sandbox).path()).expect("query the file system").filesystem_type()
        == nix::sys::statfs::TMPFS_MAGIC;
    assert!(in_memory || load.io_written_bytes.is_some_and(|bytes| bytes >= 8 << 20), "{load:?}");
}

#[test]
fn a_paused_agent_is_sampled_too_and_a_parked_one_uses_nothing() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "echo ok > up; while :; do :; done");
    wait_for_file(&sandbox, "up");
    sandbox.ctl(&["pause", "web"]);
    let paused = wait_for_load(&sandbox, "a", "a sample", |_| true);
    let later = wait_for_load(&sandbox, "a", "another sample", |load| load.sampled_at > paused.sampled_at);
    assert_eq!((later.processes, later.cpu_us), (1, paused.cpu_us), "a frozen agent used the processor");
    assert!(later.memory_bytes > 0);
    sandbox.ctl(&["resume", "web"]);
    sandbox.ctl(&["pause", "web", "--mode", "park"]);
    assert_eq!(agent(&sandbox, "a").load, None);
}

#[test]
fn samples_are_taken_only_on_request_and_have_a_time() {
    let sandbox = Sandbox::start();
    run_agent(&sandbox, "a", "echo ok > up; exec sleep 1000");
    wait_for_file(&sandbox, "up");
    let first = wait_for_load(&sandbox, "a", "a sample", |_| true);
    // Other calls take no sample, so the next `ps` shows an old one or one that it has requested.
    let again = call(&sandbox, "project.list", json!({})).expect("list");
    assert_eq!(again["projects"][0]["agents_running"], 1);
    let next = wait_for_load(&sandbox, "a", "a newer sample", |load| load.sampled_at > first.sampled_at);
    assert!(next.cpu_window_ms >= 1_900, "samples are at least two seconds apart: {next:?}");
    assert!(matches!(next.memory_kind, MemoryKind::Charged | MemoryKind::Resident));
}
