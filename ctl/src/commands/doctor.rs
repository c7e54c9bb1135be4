//! `doctor`: looks at what Fermata needs, and says what to do where it is not there.
//!
//! Never starts a daemon and changes nothing. Every check looks at the real thing.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use fermata_protocol::daemon::{DaemonStatus, DaemonStatusResult, HelloResult, Role};
use fermata_protocol::plugin::{PluginList, PluginState};
use nix::unistd::{AccessFlags, access};
use serde::Serialize;

use super::Ended;
use crate::errors::Failure;
use crate::output::{Cell, Format, Paint, Table};
use crate::session::{Session, surroundings};
use crate::units::bytes;
use crate::{autostart, connect};

/// Below this a checkpoint of any size is likely to be refused.
const LEAST_FREE: u64 = 1 << 30;

/// Below this a workspace of some size cannot be watched.
const LEAST_WATCHES: u64 = 65_536;

/// What one check found.
#[derive(Debug, Serialize)]
struct Check {
    check: &'static str,
    good: bool,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

impl Check {
    fn good(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, good: true, found: found.into(), hint: None }
    }

    fn bad(check: &'static str, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { check, good: false, found: found.into(), hint: Some(hint.into()) }
    }
}

/// Runs `doctor`; exit code 1 when anything is bad.
pub fn doctor(session: &mut Session) -> Ended {
    session.globals.no_autostart = true;
    let mut checks = Vec::new();
    let hello = reach(session, &mut checks);
    let status = match &hello {
        Some(hello) => {
            checks.push(version(hello));
            checks.push(role(hello));
            session.call(&DaemonStatus {}).ok()
        }
        None => {
            checks.push(installed());
            None
        }
    };
    if let Some(status) = &status {
        checks.push(freezer(status));
        checks.extend(plugins(session));
    }
    checks.extend(cgroup(status.as_ref().map(|s| s.pid)));
    checks.extend(state_dir(session, status.as_ref())?);
    checks.extend(watches());
    let id = |check: &Check| check.check;
    if session.out.format() == Format::Human {
        show(session, &checks)?;
    } else {
        session.out.rows(&checks, "", id, |_, _| Table::new(&[]))?;
    }
    Ok(if checks.iter().all(|c| c.good) { 0 } else { 1 })
}

fn show(session: &mut Session, checks: &[Check]) -> Result<(), Failure> {
    let mut table = Table::new(&["CHECK", "STATE", "FOUND"]);
    for check in checks {
        let state = if check.good { Cell::painted("good", Paint::Good) } else { Cell::painted("bad", Paint::Bad) };
        table.row([check.check.into(), state, Cell::from(&check.found)]);
    }
    session.out.table(&table)?;
    for check in checks {
        if let Some(hint) = &check.hint {
            session.out.line(format_args!("{}: {hint}", check.check))?;
        }
    }
    Ok(())
}

fn reach(session: &mut Session, checks: &mut Vec<Check>) -> Option<HelloResult> {
    const NAME: &str = "daemon";
    match session.hello() {
        Ok(hello) => {
            checks.push(Check::good(NAME, "answers"));
            Some(hello)
        }
        Err(Failure::Said(report)) => {
            let hint = "start it: fermatactl status (for yourself) or systemctl start fermata";
            checks.push(Check::bad(NAME, report.message, hint));
            None
        }
        Err(Failure::ReaderGone) => None,
    }
}

fn installed() -> Check {
    match autostart::program() {
        Ok(path) => Check::good("fermatad", path.display().to_string()),
        Err(_) => Check::bad(
            "fermatad",
            "not beside fermatactl and not on PATH",
            "install it there, so that commands can start it",
        ),
    }
}

fn version(hello: &HelloResult) -> Check {
    let own = env!("CARGO_PKG_VERSION");
    if hello.version == own {
        Check::good("versions", format!("client and daemon are {own}"))
    } else {
        Check::bad(
            "versions",
            format!("the client is {own}, the daemon {}", hello.version),
            "restart the daemon after an upgrade; agents keep running meanwhile",
        )
    }
}

fn role(hello: &HelloResult) -> Check {
    let found = hello.role.as_str();
    if hello.role == Role::Reader {
        Check::bad("role", found, "you may only look; to run and pause agents, join the group fermata")
    } else {
        Check::good("role", found)
    }
}

fn freezer(status: &DaemonStatusResult) -> Check {
    if status.freezer.starts_with("cgroup") {
        Check::good("freezer", &status.freezer)
    } else {
        Check::bad(
            "freezer",
            &status.freezer,
            "agents are stopped by signals, which wakes their blocking calls; give the daemon \
             a writable cgroup v2 (systemd: Delegate=yes, or run it under a user session)",
        )
    }
}

fn plugins(session: &mut Session) -> Option<Check> {
    let plugins = session.call(&PluginList {}).ok()?.plugins;
    let broken: Vec<String> = plugins
        .iter()
        .filter(|p| matches!(p.state, PluginState::Quarantined | PluginState::Failed))
        .map(|p| format!("{}: {}", p.name, p.last_error.as_deref().unwrap_or("failed")))
        .collect();
    Some(if broken.is_empty() {
        Check::good("plugins", format!("{} loaded", plugins.len()))
    } else {
        Check::bad("plugins", broken.join("; "), "mend it, then fermatactl plugin reload")
    })
}

/// Looks at the cgroup of the daemon, or of this process when there is no daemon to ask.
///
/// Only someone who runs as the daemon's user sees what the daemon may write.
fn cgroup(daemon: Option<u32>) -> Option<Check> {
    const NAME: &str = "cgroup v2";
    let hint = "without it agents are stopped by signals; mount cgroup2, or run the daemon \
                as root or in a delegated unit";
    let process = match daemon {
        None => "self".to_owned(),
        Some(pid) => {
            let owner = fs::metadata(format!("/proc/{pid}")).ok()?.uid();
            if owner != nix::unistd::geteuid().as_raw() {
                return None;
            }
            pid.to_string()
        }
    };
    let Some(mount) = read("/proc/self/mountinfo").as_deref().and_then(cgroup2_mount) else {
        return Some(Check::bad(NAME, "not mounted", hint));
    };
    let own = read(&format!("/proc/{process}/cgroup")).and_then(|text| cgroup2_path(&text));
    let Some(own) = own else {
        return Some(Check::bad(NAME, "the process is in no cgroup v2", hint));
    };
    let dir = mount.join(own.trim_start_matches('/'));
    let writable = |path: &Path| access(path, AccessFlags::W_OK).is_ok();
    Some(if writable(&dir) && writable(&dir.join("cgroup.procs")) {
        Check::good(NAME, format!("{} is writable", dir.display()))
    } else {
        Check::bad(NAME, format!("{} is not writable", dir.display()), hint)
    })
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// Finds the mount point of cgroup v2: the field after ` - ` is the file system's type.
fn cgroup2_mount(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        if right.split(' ').next() != Some("cgroup2") {
            return None;
        }
        left.split(' ').nth(4).map(PathBuf::from)
    })
}

fn cgroup2_path(cgroups: &str) -> Option<String> {
    let line = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
    Some(line.to_owned())
}

fn state_dir(session: &Session, status: Option<&DaemonStatusResult>) -> Result<Vec<Check>, Failure> {
    let dir = match status {
        Some(status) => PathBuf::from(&status.state_dir),
        None => connect::state_dir(&session.globals, &surroundings())?,
    };
    let mut checks = Vec::new();
    const NAME: &str = "state directory";
    match fs::metadata(&dir) {
        Ok(found) if found.permissions().mode() & 0o077 != 0 => checks.push(Check::bad(
            NAME,
            format!("{} can be entered by others", dir.display()),
            format!("chmod 700 {}", dir.display()),
        )),
        Ok(found) => checks.push(Check::good(NAME, format!("{} (owner {})", dir.display(), found.uid()))),
        Err(_) if status.is_none() => {
            checks.push(Check::good(NAME, format!("{} (made by the first start)", dir.display())))
        }
        Err(error) => {
            checks.push(Check::bad(NAME, format!("{}: {error}", dir.display()), "look at it as the daemon's user"))
        }
    }
    checks.extend(free_space(&dir));
    Ok(checks)
}

/// Looks at the file system of the nearest directory that exists.
fn free_space(dir: &Path) -> Option<Check> {
    let existing = dir.ancestors().find(|path| path.exists())?;
    let system = nix::sys::statvfs::statvfs(existing).ok()?;
    let free = system.blocks_available().saturating_mul(system.fragment_size());
    let found = format!("{} at {}", bytes(free), existing.display());
    Some(if free >= LEAST_FREE {
        Check::good("free space", found)
    } else {
        Check::bad("free space", found, format!("make room: checkpoints need {} to be safe", bytes(LEAST_FREE)))
    })
}

fn watches() -> Option<Check> {
    let text = read("/proc/sys/fs/inotify/max_user_watches")?;
    let limit: u64 = text.trim().parse().ok()?;
    let found = format!("{limit} per user");
    Some(if limit >= LEAST_WATCHES {
        Check::good("inotify watches", found)
    } else {
        Check::bad(
            "inotify watches",
            found,
            "large workspaces are scanned whole instead; sysctl fs.inotify.max_user_watches=524288",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_v2_mount_is_found_on_unified_and_hybrid_machines() {
        let hybrid = "30 23 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
                      31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2_mount(hybrid), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(cgroup2_mount("1 2 0:3 / / rw - ext4 /dev/x rw\n"), None);
        assert_eq!(cgroup2_path("1:cpu:/x\n0::/user.slice\n").as_deref(), Some("/user.slice"));
    }
}
