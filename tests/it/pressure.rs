//! Automatic pauses under memory pressure and on full disks, where the settings enable them.

use std::fs;
use std::path::{Path, PathBuf};

use fermata_tests::Sandbox;
use fermata_tests::waiting::{SOON, wait_until};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use crate::bed::{call, failed};

/// A small file system in memory, unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None` where this user may not mount.
    fn mount(at: &Path, mib: u64) -> Option<Self> {
        fs::create_dir_all(at).expect("make a mount point");
        let options = format!("size={mib}m");
        mount(Some("none"), at, Some("tmpfs"), MsFlags::empty(), Some(options.as_str())).ok()?;
        Some(Self(at.to_path_buf()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Detached: an agent that is being ended may still have its working directory there.
        umount2(&self.0, MntFlags::MNT_DETACH).expect("unmount the small disk");
    }
}

fn run_in(sandbox: &Sandbox, project: &str, workspace: &Path, script: &str) {
    let place = workspace.to_str().expect("UTF-8");
    sandbox.ctl(&["run", "-p", project, "-w", place, "--cwd", place, "-n", "a", "--", "/bin/sh", "-c", script]);
}

fn project(sandbox: &Sandbox, name: &str) -> Value {
    sandbox.ctl_json(&["status", name])["project"].clone()
}

fn events(sandbox: &Sandbox, kind: &str) -> Vec<Value> {
    let list = call(sandbox, "events.list", json!({ "filter": { "kinds": [kind] } })).expect("list events");
    list["events"].as_array().expect("events").clone()
}

#[test]
fn a_disk_that_gets_full_pauses_the_projects_on_it_and_no_others() {
    let config = "[pause]\ndisk_floor_bytes = 1\n[pressure]\ndisk_free_bytes = 16777216\n";
    let sandbox = Sandbox::builder().config(config).start();
    let Some(disk) = SmallDisk::mount(&sandbox.path().join("small"), 32) else {
        eprintln!("not tested: this user may not mount");
        return;
    };
    let (full, calm) = (disk.0.join("full"), disk.0.join("calm"));
    for dir in [&full, &calm] {
        fs::create_dir(dir).expect("make a workspace");
    }
    // Slowly, so that the disk is not full before the daemon has sampled it.
    let writes = "while :; do head -c 1048576 /dev/zero >> big; sleep 0.1; done";
    run_in(&sandbox, "full", &full, writes);
    run_in(&sandbox, "calm", &calm, "exec sleep 1000");
    let elsewhere = sandbox.workspace("elsewhere");
    run_in(&sandbox, "elsewhere", elsewhere.path(), "exec sleep 1000");
    for name in ["full", "calm"] {
        wait_until(SOON, &format!("{name} to be paused"), || project(&sandbox, name)["status"] == "paused");
        let pause = project(&sandbox, name)["pause"].clone();
        assert_eq!(pause["cause"], "disk_space");
        assert_eq!(pause["mode"], "freeze");
        assert!(pause["reason"].as_str().is_some_and(|reason| reason.contains("less than 16 MiB")), "{pause}");
    }
    assert_eq!(project(&sandbox, "elsewhere")["status"], "active");
    // A user resumes a project although the disk is still as full: the daemon does not pause it again.
    sandbox.ctl(&["resume", "calm"]);
    sandbox.ctl(&["kill", "full"]);
    let before = events(&sandbox, "pause.started").len();
    assert_eq!(before, 2);
    fs::remove_file(full.join("big")).expect("free the disk");
    assert_eq!(project(&sandbox, "calm")["status"], "active");
    sandbox.ctl(&["kill", "calm"]);
    sandbox.ctl(&["kill", "elsewhere"]);
    drop(disk);
}

#[test]
fn a_used_up_limit_of_pauses_is_reported_and_nothing_is_paused() {
    let config = "[pause]\ndisk_floor_bytes = 1\n[pressure]\ndisk_free_bytes = 16777216\nmax_per_hour = 0\n";
    let sandbox = Sandbox::builder().config(config).start();
    let Some(disk) = SmallDisk::mount(&sandbox.path().join("small"), 8) else {
        eprintln!("not tested: this user may not mount");
        return;
    };
    let workspace = disk.0.join("ws");
    fs::create_dir(&workspace).expect("make a workspace");
    run_in(&sandbox, "web", &workspace, "exec sleep 1000");
    wait_until(SOON, "the event pause.withheld", || !events(&sandbox, "pause.withheld").is_empty());
    let withheld = events(&sandbox, "pause.withheld");
    assert_eq!((withheld.len(), &withheld[0]["data"]["cause"]), (1, &json!("disk_space")), "{withheld:?}");
    assert_eq!(project(&sandbox, "web")["status"], "active");
    assert!(events(&sandbox, "pause.started").is_empty());
    sandbox.ctl(&["kill", "web"]);
}

/// Nothing is sampled unless the settings enable it, and a reload is enough to enable it.
#[test]
fn memory_pressure_parks_the_project_that_uses_the_most() {
    if fs::read_to_string("/proc/pressure/memory").is_err() {
        eprintln!("not tested: this kernel does not report memory pressure");
        return;
    }
    let Some(pressed) = PressedGroup::make() else {
        eprintln!("not tested: the memory controller is not on cgroup v2 here; scripts/test-machine has it");
        return;
    };
    let off = format!("[agents]\ncgroup_parent = \"{}\"\n", pressed.0.display());
    let sandbox = Sandbox::builder().config(&off).start();
    let workspaces = ["small", "large"].map(|name| sandbox.workspace(name));
    run_in(&sandbox, "small", workspaces[0].path(), "exec sleep 1000");
    // Repeatedly reads a file that is larger than its memory limit: every page has to be read again, which the kernel
    // counts as pressure.
    let thrash = "head -c 100663296 /dev/zero > big; echo ok > up; while :; do cat big > /dev/null; done";
    run_in(&sandbox, "large", workspaces[1].path(), thrash);
    wait_until(SOON, "pressure", || pressed.some_avg10() > 3.0);
    assert_eq!(project(&sandbox, "large")["status"], "active", "off by default");
    fs::write(sandbox.path().join("fermata.toml"), format!("{off}[pressure]\nmemory_some_avg10 = 2.0\n"))
        .expect("write fermata.toml");
    sandbox.ctl(&["daemon", "reload"]);
    wait_until(SOON, "large to be paused", || project(&sandbox, "large")["status"] == "paused");
    let pause = project(&sandbox, "large")["pause"].clone();
    assert_eq!((&pause["cause"], &pause["mode"]), (&json!("memory_pressure"), &json!("park")));
    assert_eq!(project(&sandbox, "small")["status"], "active", "one at a time");
    sandbox.ctl(&["kill", "small"]);
    sandbox.ctl(&["stop", "large"]);
}

/// A group with a small memory limit for all agents together, removed when dropped.
struct PressedGroup(PathBuf);

impl PressedGroup {
    fn make() -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let root = mounts.lines().find_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            after.starts_with("cgroup2 ").then(|| before.split(' ').nth(4).map(PathBuf::from))?
        })?;
        let path = root.join(format!("fermata-test-pressed-{}", std::process::id()));
        fs::create_dir(&path).ok()?;
        let group = Self(path);
        // The file is missing where the controller is not delegated.
        fs::write(group.0.join("memory.max"), (48 << 20).to_string()).ok()?;
        Some(group)
    }

    fn some_avg10(&self) -> f64 {
        let text = fs::read_to_string(self.0.join("memory.pressure")).unwrap_or_default();
        text.split("avg10=").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok()).unwrap_or(0.0)
    }
}

impl Drop for PressedGroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            assert!(std::thread::panicking(), "{} stays: {error}", self.0.display());
        }
    }
}

#[test]
fn bounds_that_could_never_work_are_refused_by_name() {
    let sandbox = Sandbox::start();
    for (bad, name) in [
        ("memory_some_avg10 = 0.0", "pressure.memory_some_avg10"),
        ("disk_free_bytes = 1000", "pause.disk_floor_bytes"),
        ("memory_mode = \"image\"", "image"),
    ] {
        fs::write(sandbox.path().join("fermata.toml"), format!("[pressure]\n{bad}\n")).expect("write fermata.toml");
        let said = failed(&sandbox.ctl_output(&["daemon", "reload"]), 1);
        assert!(said.contains(name) && said.contains("fermata.toml"), "{said}");
    }
}
