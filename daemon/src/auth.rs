//! Who a peer is and what it may do: credentials of the kernel, tokens of launches, roles.
//!
//! A call that passed is an [`Authorised`], which only this room can make.

use fermata_protocol::daemon::Role;
use fermata_protocol::method::Call;
use fermata_protocol::{Code, ProjectName, Refusal, Target};
use sha2::{Digest as _, Sha256};

use crate::config::Settings;
use crate::os::peer::{PeerCredentials, group_id};
use crate::os::process;
use crate::project::Projects;
use crate::steps::checkpoint::hex;

/// Longer lines of ancestors are not followed; whoever has one is nobody known.
const MAX_ANCESTORS: usize = 4096;

/// So many are read at once, wherever that is: `/proc` is no disk.
const FEW_ANCESTORS: usize = 32;

/// How often ancestors are looked at anew because one of them ended meanwhile.
const LOOKS: u32 = 16;

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub struct Peer {
    /// What it may do.
    pub role: Role,
    /// The agent that it is.
    pub agent: Option<Target>,
    uid: u32,
}

impl Peer {
    /// Returns whose idempotency keys these are.
    pub fn principal(&self) -> String {
        match &self.agent {
            Some(agent) => format!("agent:{agent}"),
            None => format!("uid:{}", self.uid),
        }
    }
}

/// Finds out who a peer is where that takes no time; `None` where it may: with many ancestors, or for a user whose rights
/// are those of a group.
pub fn recognise(credentials: &PeerCredentials, projects: &Projects) -> Option<Peer> {
    let uid = credentials.uid;
    match descent(credentials.pid, projects, FEW_ANCESTORS, 1) {
        Descent::Agent(agent) => Some(Peer { role: Role::Agent, agent: Some(agent), uid }),
        Descent::Nobodys if is_admin(uid) => Some(Peer { role: Role::Admin, agent: None, uid }),
        Descent::Nobodys | Descent::Unknown => None,
    }
}

fn is_admin(uid: u32) -> bool {
    uid == 0 || uid == nix::unistd::geteuid().as_raw()
}

/// Finds out who a peer is by what the kernel says of it.
///
/// # Errors
/// `permission_denied` for a user who may not even look.
pub fn identify(credentials: &PeerCredentials, settings: &Settings, projects: &Projects) -> Result<Peer, Refusal> {
    let uid = credentials.uid;
    let descent = descent(credentials.pid, projects, MAX_ANCESTORS, LOOKS);
    // Whoever runs inside an agent's tree is that agent, whatever it says.
    if let Descent::Agent(agent) = descent {
        return Ok(Peer { role: Role::Agent, agent: Some(agent), uid });
    }
    let known = matches!(descent, Descent::Nobodys);
    // Only asked for where it counts: it may come over a network.
    let operators = || group_id(&settings.operator_group).ok().flatten();
    let role = if known && is_admin(uid) {
        Role::Admin
    } else if known && operators().is_some_and(|gid| credentials.in_group(gid)) {
        Role::Operator
    } else if settings.others_may_look {
        Role::Reader
    } else {
        return Err(Refusal::new(Code::PermissionDenied, format!("user {uid} may not use this daemon"))
            .hint(format!("join the group '{}'", settings.operator_group)));
    };
    Ok(Peer { role, agent: None, uid })
}

/// Makes a peer with the token of a launch that agent.
///
/// # Errors
/// `bad_token`, or `permission_denied` for an agent that shows another agent's token.
pub fn with_token(peer: &Peer, token: &str, projects: &Projects) -> Result<Peer, Refusal> {
    let hash = hex(&Sha256::digest(token.as_bytes()));
    let agent = projects
        .agent_with_token(&hash)
        .ok_or_else(|| Refusal::new(Code::BadToken, "the token belongs to no running agent".to_owned()))?;
    match &peer.agent {
        Some(own) if *own != agent => {
            Err(Refusal::new(Code::PermissionDenied, format!("{own} may not act as {agent}")))
        }
        _ => Ok(Peer { role: Role::Agent, agent: Some(agent), uid: peer.uid }),
    }
}

/// Where a process comes from.
enum Descent {
    /// It is part of an agent's tree.
    Agent(Target),
    /// It is part of no agent's tree.
    Nobodys,
    /// That cannot be told, for instance because it has ended. It might be an agent's, so that its
    /// user's rights are not for it.
    Unknown,
}

fn descent(pid: i32, projects: &Projects, most: usize, looks: u32) -> Descent {
    // A process outside of our pid namespace cannot be below an agent, which is inside.
    if pid == 0 {
        return Descent::Nobodys;
    }
    for _ in 0..looks {
        let Some(chain) = ancestors(pid, most) else { continue };
        let agent = projects.agent_of_processes(&chain).or_else(|| projects.agent_of_shims(&chain));
        return agent.map_or(Descent::Nobodys, Descent::Agent);
    }
    Descent::Unknown
}

/// Returns a process and its ancestors; `None` when one ended meanwhile, whose children the kernel
/// has given to another parent, or when there are more than `most`.
fn ancestors(pid: i32, most: usize) -> Option<Vec<i32>> {
    let mut chain = Vec::new();
    let mut next = pid;
    while next > 1 {
        if chain.len() == most {
            return None;
        }
        let stat = process::stat(next).ok().flatten()?;
        chain.push(next);
        next = stat.ppid;
    }
    Some(chain)
}

/// A call that its peer may make, aimed at what it is about.
#[derive(Debug)]
pub struct Authorised {
    call: Call,
}

impl Authorised {
    /// Hands the call out.
    pub fn into_call(self) -> Call {
        self.call
    }
}

/// Checks that a peer may make a call, and aims an agent's call at the agent itself.
///
/// # Errors
/// `permission_denied`, or `invalid_params` when it is not said what the call is about.
pub fn authorise(peer: &Peer, mut call: Call) -> Result<Authorised, Refusal> {
    let info = call.info();
    let denied = |why: String| Err(Refusal::new(Code::PermissionDenied, why));
    match &peer.agent {
        Some(_) => {
            let harmless = matches!(call, Call::Hello(_) | Call::Discover(_));
            if !harmless && info.role != Role::Agent {
                return denied(format!("an agent may not call {}", info.name));
            }
        }
        None if peer.role < info.role => {
            return denied(format!(
                "{} needs the role {}, and you are a {}",
                info.name,
                info.role.as_str(),
                peer.role.as_str()
            ));
        }
        None => {}
    }
    if reaches_files(&call) && nix::unistd::geteuid().is_root() && peer.uid != 0 && peer.agent.is_none() {
        return Err(Refusal::new(
            Code::PermissionDenied,
            format!("{} would act with the rights of root, to whom this daemon belongs", info.name),
        )
        .hint("use a daemon of your own: unset FERMATA_SOCKET, or give --socket"));
    }
    aim(peer.agent.as_ref(), &mut call)?;
    Ok(Authorised { call })
}

/// Says whether a call runs a program or chooses, shows or writes files with the daemon's own
/// rights, or tells something of an environment. Until agents run as their own users, a root daemon does that for root alone.
fn reaches_files(call: &Call) -> bool {
    match call {
        Call::AgentRun(_)
        | Call::ProjectCreate(_)
        | Call::ProjectSet(_)
        | Call::CheckpointDiff(_)
        | Call::CheckpointRestore(_) => true,
        // Typing into a shell runs programs.
        Call::AgentAttach(params) => !params.read_only,
        Call::AgentSend(_) => true,
        Call::ProjectResume(params) => params.checkpoint.is_some(),
        // An answer to a guess is as good as the secret, when it is short.
        Call::AgentShow(params) => !params.env.is_empty(),
        _ => false,
    }
}

/// Fills in, or checks, what an agent's call is about.
fn aim(own: Option<&Target>, call: &mut Call) -> Result<(), Refusal> {
    match call {
        Call::AgentAck(p) => agent_target(own, &mut p.target),
        Call::AgentProgress(p) => agent_target(own, &mut p.target),
        Call::AgentReady(p) => agent_target(own, &mut p.target),
        Call::AgentUsage(p) => agent_target(own, &mut p.target),
        Call::StatePut(p) => agent_target(own, &mut p.target),
        Call::StateGet(p) => agent_target(own, &mut p.target),
        Call::QuestionAsk(p) => agent_target(own, &mut p.target),
        Call::ContextPut(p) => agent_target(own, &mut p.target),
        Call::TaskPut(p) => any_target(own, &mut p.target),
        Call::ContextList(p) => any_target(own, &mut p.target),
        Call::ContextSearch(p) => any_target(own, &mut p.target),
        Call::ContextFlashSave(p) => any_target(own, &mut p.target),
        Call::QuestionWait(p) => project(own, &mut p.project),
        Call::ContextShow(p) => project(own, &mut p.project),
        Call::ContextPin(p) => project(own, &mut p.project),
        Call::ContextRecall(p) => project(own, &mut p.project),
        Call::TaskList(p) => project(own, &mut p.project),
        Call::CheckpointCreate(p) => project(own, &mut p.project),
        Call::ProjectShow(p) => same_project(own, &p.project),
        Call::ProjectPause(p) => same_project(own, &p.project),
        _ => Ok(()),
    }
}

fn missing(what: &str) -> Refusal {
    Refusal::new(Code::InvalidParams, format!("'{what}' is needed: only an agent's own calls go without it"))
        .hint("an agent is who has its token in FERMATA_TOKEN; whoever else asks names the agent or the project")
}

fn not_yours(own: &Target, what: &dyn std::fmt::Display) -> Refusal {
    Refusal::new(Code::PermissionDenied, format!("agent {own} may not touch {what}"))
}

fn agent_target(own: Option<&Target>, target: &mut Option<Target>) -> Result<(), Refusal> {
    any_target(own, target)?;
    match target {
        Some(Target { agent: Some(_), .. }) => Ok(()),
        Some(project) => Err(Refusal::new(
            Code::InvalidParams,
            format!("'target' is the project '{project}', not one of its agents"),
        )
        .hint(format!("{project}/AGENT"))),
        None => Err(missing("target")),
    }
}

fn any_target(own: Option<&Target>, target: &mut Option<Target>) -> Result<(), Refusal> {
    match (own, &*target) {
        (Some(own), Some(given)) if given != own => Err(not_yours(own, given)),
        (Some(own), None) => {
            *target = Some(own.clone());
            Ok(())
        }
        (None, None) => Err(missing("target")),
        _ => Ok(()),
    }
}

fn project(own: Option<&Target>, given: &mut Option<ProjectName>) -> Result<(), Refusal> {
    match (own, &*given) {
        (_, Some(name)) => same_project(own, name),
        (Some(own), None) => {
            *given = Some(own.project.clone());
            Ok(())
        }
        (None, None) => Err(missing("project")),
    }
}

fn same_project(own: Option<&Target>, given: &ProjectName) -> Result<(), Refusal> {
    match own {
        Some(own) if own.project != *given => Err(not_yours(own, given)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fermata_protocol::agent::{AgentProgress, AgentRun};
    use serde_json::{Map, json};

    fn call(method: &str, params: serde_json::Value) -> Call {
        let serde_json::Value::Object(params) = params else { return Call::parse(method, Map::new()).expect("parses") };
        Call::parse(method, params).expect("parses")
    }

    fn peer(role: Role, agent: Option<&str>) -> Peer {
        Peer { role, agent: agent.map(|a| a.parse().expect("valid")), uid: 1234 }
    }

    #[test]
    fn roles_bound_what_may_be_called() {
        let pause = || call("project.pause", json!({ "project": "web" }));
        assert!(authorise(&peer(Role::Reader, None), pause()).is_err());
        assert!(authorise(&peer(Role::Operator, None), pause()).is_ok());
        let reload = || call("daemon.reload", json!({}));
        assert!(authorise(&peer(Role::Operator, None), reload()).is_err());
        assert!(authorise(&peer(Role::Admin, None), reload()).is_ok());
    }

    #[test]
    fn an_agent_reaches_only_its_own_things() {
        let me = peer(Role::Agent, Some("web/coder"));
        let aimed = authorise(&me, call("agent.progress", json!({ "percent": 5.0 }))).expect("allowed").into_call();
        let Call::AgentProgress(AgentProgress { target: Some(target), .. }) = aimed else { panic!("aimed") };
        assert_eq!(target.to_string(), "web/coder");
        for (method, params) in [
            ("agent.progress", json!({ "target": "web/other" })),
            ("project.pause", json!({ "project": "api" })),
            ("agent.list", json!({})),
            ("agent.stop", json!({ "target": "web/coder" })),
            ("context.show", json!({ "project": "api", "id": 1 })),
            ("checkpoint.restore", json!({ "project": "web", "checkpoint": 1 })),
        ] {
            let error = authorise(&me, call(method, params)).expect_err(method);
            assert_eq!(error.code, Code::PermissionDenied, "{method}");
        }
    }

    #[test]
    fn a_person_says_whom_a_report_is_about() {
        let error = authorise(&peer(Role::Admin, None), call("agent.progress", json!({}))).expect_err("no target");
        assert_eq!(error.code, Code::InvalidParams);
    }

    #[test]
    fn a_root_daemon_runs_nothing_for_others() {
        let run = AgentRun {
            project: "web".parse().expect("valid"),
            workspace: None,
            name: None,
            argv: vec!["true".into()],
            env: Default::default(),
            cwd: None,
            umask: None,
            limits: Default::default(),
            resume_argv: None,
            profile: None,
            stop_grace_ms: None,
            supervision: Default::default(),
        };
        let refused = authorise(&peer(Role::Operator, None), Call::AgentRun(run)).is_err();
        assert_eq!(refused, nix::unistd::geteuid().is_root());
    }
}
