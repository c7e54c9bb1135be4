//! Limits of an agent's tree: set where the controllers are delegated, elsewhere refused before a process is started.

use std::fs;
use std::path::{Path, PathBuf};

use fermata_protocol::agent::AgentStatus;
use fermata_protocol::{Code, agent::AgentView};
use fermata_tests::Sandbox;
use fermata_tests::waiting::{SOON, wait_until};
use serde_json::{Value, json};

use crate::bed::{SIGNALS, agent, call, failed, members, refused, run_record, wait_for_file, wait_for_status, web};

const ALL: [&str; 3] = ["cpu", "memory", "pids"];

/// Returns the mount point of cgroup v2.
fn mount() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        after.starts_with("cgroup2 ").then(|| before.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// A group below the root that can delegate controllers, removed when dropped.
struct Delegated(PathBuf);

impl Delegated {
    /// `None` where this machine has no cgroup v2 controller to delegate.
    fn make(name: &str) -> Option<Self> {
        let root = mount()?;
        let offered = fs::read_to_string(root.join("cgroup.subtree_control")).ok()?;
        if !ALL.iter().all(|name| offered.split_whitespace().any(|word| word == *name)) {
            return None;
        }
        let path = root.join(format!("fermata-test-{name}-{}", std::process::id()));
        fs::create_dir(&path).ok()?;
        Some(Self(path))
    }

    fn config(&self) -> String {
        format!("[agents]\ncgroup_parent = \"{}\"\n", self.0.display())
    }
}

impl Drop for Delegated {
    fn drop(&mut self) {
        // The sandbox has ended the agents, whose groups are removed with them.
        if let Err(error) = fs::remove_dir(&self.0) {
            assert!(std::thread::panicking(), "{} stays: {error}", self.0.display());
        }
    }
}

fn run_limited(sandbox: &Sandbox, limits: Value, script: &str) -> Result<Value, fermata_protocol::client::ClientError> {
    let workspace = web(sandbox);
    let params = json!({
        "project": "web", "workspace": workspace.text(), "name": "a", "argv": ["/bin/sh", "-c", script],
        "env": { "PATH": std::env::var("PATH").unwrap_or_default() },
        "supervision": { "resources": limits },
    });
    sandbox.rpc().call_raw("agent.run", members(params), |_| {})
}

fn nothing_was_started(sandbox: &Sandbox) {
    assert!(sandbox.agents().is_empty());
    let projects = call(sandbox, "project.list", json!({})).expect("list");
    assert_eq!(projects["projects"], json!([]), "not even a project is made");
}

#[test]
fn limits_that_cannot_be_set_are_refused_before_anything_is_started() {
    let sandbox = Sandbox::builder().config(SIGNALS).start();
    assert_eq!(refused(run_limited(&sandbox, json!({ "pids_max": 5 }), "exit 0")), Code::LimitsUnavailable);
    nothing_was_started(&sandbox);
    let workspace = web(&sandbox);
    let command = ["run", "-p", "web", "-w", workspace.text(), "--memory-max", "2G", "--cpus", "1.5", "--", "true"];
    let said = failed(&sandbox.ctl_output(&command), 1);
    assert!(said.contains("agents.freezer") && said.contains("fermata.toml"), "{said}");
    nothing_was_started(&sandbox);
}

#[test]
fn a_group_without_controllers_is_named_with_what_is_missing() {
    // The daemon's own group contains the daemon, so it cannot delegate; on a hybrid machine it has no controllers
    // either.
    let sandbox = Sandbox::start();
    if sandbox.daemon_group().is_none() {
        eprintln!("not tested: this machine has no writable cgroup v2");
        return;
    }
    let workspace = web(&sandbox);
    let command = ["run", "-p", "web", "-w", workspace.text(), "--memory-max", "64M", "--", "true"];
    let said = failed(&sandbox.ctl_output(&command), 1);
    assert!(said.contains("resources cannot be limited: "), "{said}");
    let missing = said.contains("does not have the memory controller") && said.contains("cgroup");
    let occupied = said.contains("holds processes") && said.contains("controllers.conf");
    assert!(missing || occupied, "{said}");
    nothing_was_started(&sandbox);
}

#[test]
fn limits_that_make_no_sense_are_refused_by_name() {
    let sandbox = Sandbox::start();
    for (limits, name) in [
        (json!({ "memory_max_bytes": 1 }), "memory_max_bytes"),
        (json!({ "cpu_max_percent": 0 }), "cpu_max_percent"),
        (json!({ "pids_max": 0 }), "pids_max"),
    ] {
        let error = run_limited(&sandbox, limits, "exit 0").expect_err(name);
        assert!(error.to_string().contains(name), "{error}");
    }
    nothing_was_started(&sandbox);
    let command = ["run", "-p", "web", "--cpus", "0", "--", "true"];
    failed(&sandbox.ctl_output(&command), 2);
}

fn group_of(sandbox: &Sandbox) -> PathBuf {
    PathBuf::from(run_record(sandbox, "a")["cgroup"].as_str().expect("it has a group"))
}

fn setting(group: &Path, file: &str) -> String {
    fs::read_to_string(group.join(file)).unwrap_or_else(|e| panic!("read {file}: {e}")).trim().to_owned()
}

#[test]
fn limits_are_set_before_the_agent_runs_and_hold_for_its_whole_tree() {
    let Some(delegated) = Delegated::make("set") else {
        eprintln!("not tested: cpu, memory and pids are not on cgroup v2 here; scripts/test-machine has them");
        return;
    };
    let sandbox = Sandbox::builder().config(&delegated.config()).start();
    let limits = json!({ "memory_max_bytes": 64 << 20, "cpu_max_percent": 150, "pids_max": 20 });
    let forks = "i=0; while [ $i -lt 30 ]; do sleep 1000 & i=$((i+1)); done; echo all > forked; wait";
    run_limited(&sandbox, limits, &format!("({forks}) 2> refused; echo done > done; exec sleep 1000")).expect("run");
    let group = group_of(&sandbox);
    assert!(group.starts_with(&delegated.0));
    assert_eq!(setting(&group, "memory.max"), (64 << 20).to_string());
    assert_eq!(setting(&group, "memory.oom.group"), "1");
    assert_eq!(setting(&group, "cpu.max"), "150000 100000");
    assert_eq!(setting(&group, "pids.max"), "20");
    // The shell exits at the first fork that fails.
    wait_until(SOON, "a fork to be refused", || web(&sandbox).read("refused").to_lowercase().contains("fork"));
    sandbox.ctl(&["kill", "web/a"]);
    assert_eq!(agent(&sandbox, "a").detail, None);
}

#[test]
fn an_agent_that_exceeds_its_memory_is_killed_whole_and_says_why() {
    let Some(delegated) = Delegated::make("memory") else {
        eprintln!("not tested: cpu, memory and pids are not on cgroup v2 here; scripts/test-machine has them");
        return;
    };
    let sandbox = Sandbox::builder().config(&delegated.config()).start();
    // `tail` keeps a line without an end in memory; its parent would continue if only `tail` was killed.
    let script = "echo $$ > pid; tail -n 1 /dev/zero; sleep 1000";
    run_limited(&sandbox, json!({ "memory_max_bytes": 32 << 20 }), script).expect("run");
    wait_for_file(&sandbox, "pid");
    wait_for_status(&sandbox, "a", AgentStatus::Failed);
    let ended: AgentView = agent(&sandbox, "a");
    assert_eq!(ended.detail.as_deref(), Some("killed for exceeding memory.max"), "{ended:?}");
}
