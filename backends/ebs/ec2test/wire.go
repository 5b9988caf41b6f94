package ec2test

import (
	"encoding/json"
	"encoding/xml"
	"maps"
	"net/http"
	"slices"
	"time"
)

type items[T any] struct {
	Items []T `xml:"item"`
}

type tagXML struct {
	Key   string `xml:"key"`
	Value string `xml:"value"`
}

type attachmentXML struct {
	Volume   string `xml:"volumeId"`
	Instance string `xml:"instanceId"`
	Device   string `xml:"device"`
	Status   string `xml:"status"`
	Time     string `xml:"attachTime"`
	Delete   bool   `xml:"deleteOnTermination"`
}

type volXML struct {
	ID          string               `xml:"volumeId"`
	Size        int                  `xml:"size"`
	Snapshot    string               `xml:"snapshotId"`
	Zone        string               `xml:"availabilityZone"`
	Status      string               `xml:"status"`
	Created     string               `xml:"createTime"`
	Attachments items[attachmentXML] `xml:"attachmentSet"`
	Tags        *items[tagXML]       `xml:"tagSet,omitempty"`
	Type        string               `xml:"volumeType"`
	IOPS        string               `xml:"iops,omitempty"`
	Throughput  string               `xml:"throughput,omitempty"`
	Encrypted   bool                 `xml:"encrypted"`
	Multi       bool                 `xml:"multiAttachEnabled"`
}

type volumesXML struct {
	Volumes items[volXML] `xml:"volumeSet"`
	Next    string        `xml:"nextToken,omitempty"`
}

type done struct {
	Return bool `xml:"return"`
}

type stateXML struct {
	Code int    `xml:"code"`
	Name string `xml:"name"`
}

type instanceXML struct {
	ID        string   `xml:"instanceId"`
	State     stateXML `xml:"instanceState"`
	Type      string   `xml:"instanceType"`
	Placement struct {
		Zone string `xml:"availabilityZone"`
	} `xml:"placement"`
}

type reservationXML struct {
	ID        string             `xml:"reservationId"`
	Owner     string             `xml:"ownerId"`
	Instances items[instanceXML] `xml:"instancesSet"`
}

type instancesXML struct {
	Reservations items[reservationXML] `xml:"reservationSet"`
}

type changeXML struct {
	ID     string   `xml:"instanceId"`
	Now    stateXML `xml:"currentState"`
	Before stateXML `xml:"previousState"`
}

type changesXML struct {
	Instances items[changeXML] `xml:"instancesSet"`
}

type typeXML struct {
	Type string `xml:"instanceType"`
	EBS  struct {
		Most  int    `xml:"maximumEbsAttachments"`
		Limit string `xml:"attachmentLimitType"`
	} `xml:"ebsInfo"`
}

type typesXML struct {
	Types items[typeXML] `xml:"instanceTypeSet"`
}

func (a *attachment) xml(volume string) attachmentXML {
	return attachmentXML{volume, a.instance, a.device, a.state, time.Now().UTC().Format(time.RFC3339), false}
}

func volumeXML(v *volume) volXML {
	x := volXML{
		ID: v.id, Size: v.gib, Zone: v.zone, Status: v.state, Created: v.made.UTC().Format(time.RFC3339), Type: v.kind,
		IOPS: itoa(v.iops), Throughput: itoa(v.throughput), Encrypted: v.encrypted,
	}
	if v.attachment != nil {
		x.Attachments.Items = []attachmentXML{v.attachment.xml(v.id)}
	}
	if len(v.tags) > 0 {
		x.Tags = &items[tagXML]{}
		for _, key := range slices.Sorted(maps.Keys(v.tags)) {
			x.Tags.Items = append(x.Tags.Items, tagXML{key, v.tags[key]})
		}
	}
	return x
}

func stateOf(name string) stateXML {
	codes := map[string]int{"pending": 0, "running": 16, "shutting-down": 32, "terminated": 48, "stopping": 64, "stopped": 80}
	return stateXML{codes[name], name}
}

func (i *instance) reservation() reservationXML {
	x := instanceXML{ID: i.id, State: stateOf(i.state), Type: i.kind}
	x.Placement.Zone = i.zone
	return reservationXML{ID: "r-" + i.id[2:], Owner: "123456789012", Instances: items[instanceXML]{[]instanceXML{x}}}
}

const requestID = "00000000-0000-4000-8000-000000000000"

// reply writes an answer as EC2's query protocol has it: the fields of the answer
// directly in <ActionResponse>.
func (s *Server) reply(w http.ResponseWriter, action string, answer any) {
	e := xml.NewEncoder(w)
	w.Header().Set("Content-Type", "text/xml;charset=UTF-8")
	start := xml.StartElement{Name: xml.Name{Local: action + "Response"}, Attr: []xml.Attr{{Name: xml.Name{Local: "xmlns"}, Value: "http://ec2.amazonaws.com/doc/2016-11-15/"}}}
	_ = e.EncodeElement(answer, start)
}

func (s *Server) fail(w http.ResponseWriter, bad *refusal) {
	w.Header().Set("Content-Type", "text/xml;charset=UTF-8")
	w.WriteHeader(bad.status)
	type failure struct {
		Code    string
		Message string
	}
	_ = xml.NewEncoder(w).Encode(struct {
		XMLName   xml.Name  `xml:"Response"`
		Errors    []failure `xml:"Errors>Error"`
		RequestID string
	}{Errors: []failure{{bad.code, bad.text}}, RequestID: requestID})
}

// Metadata is the metadata service of an instance, by its second version only.
func (s *Server) Metadata(id, region string) http.Handler {
	const token = "metadata-token"
	mux := http.NewServeMux()
	mux.HandleFunc("PUT /latest/api/token", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", r.Header.Get("X-Aws-Ec2-Metadata-Token-Ttl-Seconds"))
		_, _ = w.Write([]byte(token))
	})
	mux.HandleFunc("GET /latest/dynamic/instance-identity/document", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Aws-Ec2-Metadata-Token") != token {
			http.Error(w, "no token", http.StatusUnauthorized)
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		_ = json.NewEncoder(w).Encode(map[string]string{"instanceId": id, "region": region, "availabilityZone": s.instances[id].zone})
	})
	return mux
}
