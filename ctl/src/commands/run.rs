//! `run`: starts an agent with the caller's environment, directory, umask and limits.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fermata_protocol::agent::{AgentRun, AgentView, ResourceLimit};
use fermata_protocol::budget::Budget;
use fermata_protocol::project::ProjectShow;
use fermata_protocol::supervision::{Hook, Supervision, TerminalSize};
use fermata_protocol::{Code, ProjectName};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::stat::{Mode, umask};

use super::{Ended, agents, logs, target_of};
use crate::autostart::IDENTITY;
use crate::cli::RunArgs;
use crate::cli::values::split_words;
use crate::errors::Failure;
use crate::output::{Format, note};
use crate::raw_terminal;
use crate::session::Session;
use crate::units::millis;

/// Runs `run`.
pub fn run(session: &mut Session, args: RunArgs) -> Ended {
    let (wait, follow, attach) = (args.wait, args.logs, args.attach);
    let agent = start(session, args)?;
    let target = target_of(&agent);
    if attach {
        return super::attach::after_start(session, &target);
    }
    if (wait || follow) && session.out.is_human() {
        note(&format!("{target} started"));
    }
    if follow {
        logs::follow(session, &target)?;
    } else if !wait || session.out.format() == Format::Ids {
        session.out.one(&agent, Some(target.to_string()), |out, agent| match agent.pid {
            Some(pid) => out.line(format_args!("{target} started, pid {pid}")),
            None => out.line(format_args!("{target} is {}", agent.status)),
        })?;
        session.out.flush()?;
    }
    if !wait {
        return Ok(0);
    }
    let ended = agents::wait_for(session, &target, super::timeout_ms(session))?;
    if session.out.format() == Format::Json {
        session.out.json(&ended)?;
    }
    Ok(agents::exit_code(&ended))
}

fn start(session: &mut Session, args: RunArgs) -> Result<AgentView, Failure> {
    let here = std::env::current_dir().map_err(|e| Failure::io("find the current directory", &e))?;
    let (workspace, its) = match args.workspace.as_deref().map(canonical).transpose()? {
        Some(given) => (Some(given.clone()), given),
        None => workspace_of(session, &args.project, &here)?,
    };
    // The caller's own directory where that is inside the workspace, which is what a person at a
    // prompt means; else none, and the daemon takes the workspace itself.
    let cwd = match &args.cwd {
        Some(dir) => Some(canonical(dir)?),
        None => Some(canonical(&here)?).filter(|here| here.starts_with(&its)),
    };
    let resume_argv = match args.resume_command {
        Some(line) => Some(words_of("--resume-command", &line)?),
        None => Some(args.resume_args).filter(|words| !words.is_empty()),
    };
    let argv = args
        .command
        .into_iter()
        .map(|word| {
            word.into_string()
                .map_err(|word| Failure::usage(format!("the argument '{}' is not valid UTF-8", word.to_string_lossy())))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let params = AgentRun {
        project: args.project,
        workspace: workspace.as_deref().map(text).transpose()?,
        name: args.name,
        argv,
        env: environment(std::env::vars_os()),
        cwd: cwd.as_deref().map(text).transpose()?,
        umask: Some(own_umask()),
        limits: own_limits(),
        resume_argv,
        profile: args.profile,
        stop_grace_ms: args.stop_grace.map(millis),
        supervision: Box::new(Supervision {
            pre_start: hook("--pre-start", args.hooks.pre_start, args.hooks.pre_start_timeout)?,
            post_stop: hook("--post-stop", args.hooks.post_stop, args.hooks.post_stop_timeout)?,
            terminal: args.tty.then(terminal_size),
            resources: args.resources.into(),
            budget: args.budget.over(Budget::default()),
            ..args.supervision.settings()?
        }),
    };
    session.call(&params)
}

fn terminal_size() -> TerminalSize {
    raw_terminal::size().unwrap_or(TerminalSize { rows: 24, cols: 80 })
}

fn words_of(flag: &str, line: &str) -> Result<Vec<String>, Failure> {
    let words = split_words(line).map_err(|e| Failure::usage(format!("{flag}: {e}")))?;
    if words.is_empty() { Err(Failure::usage(format!("{flag} is empty"))) } else { Ok(words) }
}

fn hook(flag: &str, line: Option<String>, timeout: Option<Duration>) -> Result<Option<Hook>, Failure> {
    let Some(line) = line else { return Ok(None) };
    Ok(Some(Hook { argv: words_of(flag, &line)?, timeout_ms: timeout.map(millis) }))
}

/// Finds the workspace of a project: the one to send with the agent, needed for a new project
/// alone, which is made of this very directory; and the one that it has, or will have.
fn workspace_of(
    session: &mut Session,
    project: &ProjectName,
    here: &Path,
) -> Result<(Option<PathBuf>, PathBuf), Failure> {
    match session.call(&ProjectShow { project: project.clone() }) {
        Ok(detail) => Ok((None, PathBuf::from(detail.project.workspace))),
        Err(failure) if failure.is(Code::ProjectNotFound) => {
            let here = canonical(here)?;
            Ok((Some(here.clone()), here))
        }
        Err(failure) => Err(failure),
    }
}

/// Makes a path absolute and free of links.
pub fn canonical(path: &Path) -> Result<PathBuf, Failure> {
    path.canonicalize().map_err(|e| Failure::io(format!("find {}", path.display()), &e))
}

/// Returns a path as the protocol carries it.
pub fn text(path: &Path) -> Result<String, Failure> {
    match path.to_str() {
        Some(text) => Ok(text.into()),
        None => Err(Failure::usage(format!("the path {} is not valid UTF-8", path.display()))),
    }
}

/// The environment that the agent gets, without what says that the caller itself is an agent.
pub fn environment(variables: impl Iterator<Item = (OsString, OsString)>) -> BTreeMap<String, String> {
    let mut kept = BTreeMap::new();
    for (name, value) in variables {
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => {
                if !IDENTITY.contains(&name.as_str()) {
                    kept.insert(name, value);
                }
            }
            (Ok(name), Err(_)) => note(&format!("warning: the variable {name} is not valid UTF-8 and is left out")),
            (Err(name), _) => {
                note(&format!("warning: the variable {} is not valid UTF-8 and is left out", name.to_string_lossy()))
            }
        }
    }
    kept
}

/// Reads the umask, which can only be read by setting it; no other thread makes files meanwhile.
pub fn own_umask() -> u32 {
    let mask = umask(Mode::from_bits_truncate(0o077));
    umask(mask);
    mask.bits()
}

/// Returns the resource limits of this process.
pub fn own_limits() -> BTreeMap<String, ResourceLimit> {
    const LIMITS: [(&str, Resource); 16] = [
        ("as", Resource::RLIMIT_AS),
        ("core", Resource::RLIMIT_CORE),
        ("cpu", Resource::RLIMIT_CPU),
        ("data", Resource::RLIMIT_DATA),
        ("fsize", Resource::RLIMIT_FSIZE),
        ("locks", Resource::RLIMIT_LOCKS),
        ("memlock", Resource::RLIMIT_MEMLOCK),
        ("msgqueue", Resource::RLIMIT_MSGQUEUE),
        ("nice", Resource::RLIMIT_NICE),
        ("nofile", Resource::RLIMIT_NOFILE),
        ("nproc", Resource::RLIMIT_NPROC),
        ("rss", Resource::RLIMIT_RSS),
        ("rtprio", Resource::RLIMIT_RTPRIO),
        ("rttime", Resource::RLIMIT_RTTIME),
        ("sigpending", Resource::RLIMIT_SIGPENDING),
        ("stack", Resource::RLIMIT_STACK),
    ];
    let bounded = |limit| (limit != RLIM_INFINITY).then_some(limit);
    let mut limits = BTreeMap::new();
    for (name, resource) in LIMITS {
        // A limit that this kernel does not know is none that could be handed on.
        if let Ok((soft, hard)) = getrlimit(resource) {
            let limit = ResourceLimit { soft: bounded(soft), hard: bounded(hard) };
            limits.insert(name.into(), limit);
        }
    }
    limits
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt as _;

    #[test]
    fn an_agents_identity_is_not_handed_on() {
        let variables = [
            ("PATH".into(), "/bin".into()),
            ("FERMATA_TOKEN".into(), "secret".into()),
            ("BAD".into(), OsString::from_vec(vec![0xff])),
        ];
        let kept = environment(variables.into_iter());
        assert_eq!(kept.into_iter().collect::<Vec<_>>(), [("PATH".into(), "/bin".into())]);
    }

    #[test]
    fn the_limits_of_this_process_are_read() {
        let limits = own_limits();
        assert!(limits.contains_key("nofile") && limits.contains_key("core"));
    }
}
